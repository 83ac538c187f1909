"""What was adapted, what was not and why, as data and as text."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.reports import QuantizationReport, ShownInNotebooks
from passes.quantize.packed_weights import count_bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteRow:
    """One adapted weight.

    Attributes:
        name: the site's name.
        role: the role of the weight in its block, such as ``query``; ``linear`` if it is not known.
        depth: the index of its block, or ``None``.
        shape: the weight's shape.
        op: the operator that uses it.
        form: the adapter's form.
        rank: the number of its triplets.
        live: the number of triplets whose λ is not zero.
        parameters: the number of values in the adapter's parameters.
        rounding_error: of the last fold, or ``None``.
    """

    name: str
    role: str
    depth: int | None
    shape: tuple[int, ...]
    op: str
    form: str
    rank: int
    live: int
    parameters: int
    rounding_error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterReport(ShownInNotebooks):
    """What :meth:`AdaptedModel.report` returns; ``str()`` gives a table.

    Attributes:
        sites: one row for each adapted weight.
        rejected: why each other weight of two or more dimensions has no adapter, by name.
        unused: weights with an adapter that the first call did not use; empty before the first call.
        trainable_parameters: the number of trained values.
        total_parameters: the number of values in the model's own parameters.
        model_bytes: memory of the model's parameters and buffers, in bytes.
        trainable_bytes: memory of the trained parameters, in bytes; gradients need the same, Adam's moments twice that.
        quantization: the report of quantizing, or ``None``.
    """

    sites: tuple[SiteRow, ...]
    rejected: Mapping[str, str]
    unused: tuple[str, ...]
    trainable_parameters: int
    total_parameters: int
    model_bytes: int
    trainable_bytes: int
    quantization: QuantizationReport | None = None

    @property
    def training_bytes(self) -> int:
        """Memory of all parameters, gradients and Adam's two moments, in bytes, without activations."""
        return self.model_bytes + 4 * self.trainable_bytes

    @property
    def trainable_share(self) -> float:
        """The number of trained values divided by the number of the model's own."""
        return self.trainable_parameters / max(1, self.total_parameters)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        computed = {"trainable_share": self.trainable_share, "training_bytes": self.training_bytes}
        return {**dataclasses.asdict(self), **computed}

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(file=io.StringIO(), width=160, record=True)
        console.print(self)
        return console.export_text()

    def __rich_console__(self, console: Any, options: Any) -> Any:
        from rich.table import Table

        table = Table(title=f"{len(self.sites)} adapted weights", title_justify="left")
        for heading in ("weight", "role", "block", "shape", "used by", "form"):
            table.add_column(heading)
        for heading in ("rank", "live λ", "parameters", "rounding error"):
            table.add_column(heading, justify="right")
        for row in self.sites:
            error = "" if row.rounding_error is None else f"{row.rounding_error:.1e}"
            cells = (row.rank, row.live, f"{row.parameters:,}", error)
            shape = "×".join(map(str, row.shape))
            block = "" if row.depth is None else str(row.depth)
            table.add_row(row.name, row.role, block, shape, row.op, row.form, *map(str, cells))
        yield table
        yield from (f"no adapter: {name}: {reason}" for name, reason in self.rejected.items())
        yield from (f"not used by the first call: {name}" for name in self.unused)
        if (packed := self.quantization) is not None:
            worst = max(error.relative for error in packed.errors.values())
            yield (
                f"{len(packed.errors)} weights in {packed.kind} (relative error up to {worst:.1%}): the model takes "
                f"{_gigabytes(packed.bytes_after)}, before {_gigabytes(packed.bytes_before)}"
            )
        yield (
            f"trains {self.trainable_parameters:,} values, {self.trainable_share:.2%} "
            f"of the model's {self.total_parameters:,}; weights {_gigabytes(self.model_bytes)}, with gradients and "
            f"Adam's moments {_gigabytes(self.training_bytes)} (activations not counted)"
        )


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(count_bytes(tensor) for tensor in tensors)


def _count_live(rank: int, parameters: Mapping[str, torch.Tensor]) -> int:
    """The number of triplets whose λ is not zero; the rank for a form without λ."""
    lam = parameters.get("lam")
    if lam is None:
        return rank
    return 0 if lam.is_meta else int(torch.count_nonzero(lam.detach()))


def describe_adapters(adapted: AdapterState) -> AdapterReport:
    """The report of an adapted model in its present state."""
    errors = adapted.fold_report.rounding_error if adapted.fold_report else {}
    rows = []
    for adapter in adapted.plan:
        parameters = adapted.adapters.parameters_of(adapter)
        rows.append(
            SiteRow(
                name=adapter.site.name,
                role=adapter.site.role,
                depth=adapter.site.depth,
                shape=adapter.site.shape,
                op=adapter.site.op,
                form=adapter.form.name,
                rank=adapter.rank,
                live=_count_live(adapter.rank, parameters),
                parameters=sum(p.numel() for p in parameters.values()),
                rounding_error=errors.get(adapter.site.name),
            )
        )
    return AdapterReport(
        sites=tuple(rows),
        rejected=dict(adapted.rejected),
        unused=adapted.unused,
        trainable_parameters=sum(p.numel() for p in adapted.trainable_parameters()),
        total_parameters=sum(p.numel() for p in adapted.module.parameters()),
        model_bytes=_count_bytes((*adapted.module.parameters(), *adapted.module.buffers())),
        trainable_bytes=_count_bytes(adapted.trainable_parameters()),
        quantization=adapted.quantization_report,
    )
