"""The report of an export: what was tried, what was written, and how the file was verified."""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapter_compiler.adapters.reports import FoldReport, ShownInNotebooks


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputError:
    """The difference of one output from PyTorch's on one input.

    Attributes:
        case: the input: ``example``, ``batch 5``, ``dimension 1 of size 9``, ``random values 2``.
        output: the output's name.
        max_abs: largest absolute difference.
        max_rel: the same over the largest absolute value that PyTorch gives.
        argmax_agreement: share of the rows whose largest entry along the last dimension is the same one;
            ``None`` for outputs that are not rows of floating-point values.
    """

    case: str
    output: str
    max_abs: float
    max_rel: float
    argmax_agreement: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleError:
    """The difference of one output over all samples.

    Attributes:
        output: the output's name.
        max_abs: largest absolute difference.
        mean_abs: mean absolute difference of all finite values.
        max_rel: largest difference relative to the largest value of the output in its batch.
        argmax_agreement: share of the rows whose largest entry along the last dimension is the same one;
            ``None`` for outputs that are not rows of floating-point values.
    """

    output: str
    max_abs: float
    mean_abs: float
    max_rel: float
    argmax_agreement: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleMetric:
    """A metric of the user's: its mean over the samples by the reference's outputs, and by those of the file."""

    name: str
    reference: float
    found: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleReport:
    """How a file does on the user's data.

    Attributes:
        subject: what of the file was compared, as in ``base model``; empty if there is one thing only.
        reference: what it was compared with.
        batches: their number.
        rows: the sum of their sizes.
        errors: one entry for each output.
        metrics: one entry for each number that the user's metric gives.
        not_given: parts of the batches that are no arguments of the model's call, such as labels.
    """

    subject: str
    reference: str
    batches: int
    rows: int
    errors: tuple[SampleError, ...]
    metrics: tuple[SampleMetric, ...] = ()
    not_given: tuple[str, ...] = ()

    def describe(self) -> Iterator[str]:
        """The report in a few lines."""
        subject = f", {self.subject}" if self.subject else ""
        yield f"on {self.rows} samples in {self.batches} batches{subject}, beside {self.reference}:"
        for error in self.errors:
            agreement = "" if error.argmax_agreement is None else f", argmax agrees on {error.argmax_agreement:.2%}"
            yield f"  {error.output}: error up to {error.max_abs:.1e}, {error.mean_abs:.1e} on average{agreement}"
        for metric in self.metrics:
            yield f"  {metric.name}: {self.reference} {metric.reference:.6g}, the file {metric.found:.6g}"
        if self.not_given:
            yield f"  not given to the model: {', '.join(self.not_given)}"


def summarize_verification(
    against: str, errors: Sequence[OutputError], samples: Sequence[SampleReport] = (), not_verified: Sequence[str] = ()
) -> dict[str, Any]:
    """How a file was verified, for its metadata: see ``append_verification``.

    Args:
        against: what it was compared with.
        errors: one entry for each output on each input.
        samples: how it does on the user's data.
        not_verified: inputs that it could not be verified on.
    """
    every: list[OutputError | SampleError] = [*errors, *(error for report in samples for error in report.errors)]
    outputs = {
        name: {
            "max_abs": _largest([error.max_abs for error in every if error.output == name]),
            "max_rel": _largest([error.max_rel for error in every if error.output == name]),
        }
        for name in dict.fromkeys(error.output for error in every)
    }
    return {
        "against": against,
        "inputs": len({error.case for error in errors}),
        "outputs": outputs,
        "rows": max((report.rows for report in samples), default=0),
        "not_verified": list(not_verified),
    }


def _largest(values: Sequence[float]) -> float | None:
    """The largest value; ``None`` if one is not finite, which JSON cannot say."""
    return max(values) if all(map(math.isfinite, values)) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportAttempt:
    """One strategy that was tried, and why it failed; ``None`` for the one that wrote the file."""

    strategy: str
    reason: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport(ShownInNotebooks):
    """The result of an export: ``print`` it for a summary, ``print(report.rows())`` for each input, or read its fields.

    Attributes:
        path: the ONNX file.
        inputs: names of its inputs, in the order of the call's tensors.
        outputs: names of its outputs, in the order of the model's.
        dynamic: which dimensions were asked to be open: ``"all"``, ``"larger"`` (those above one in the example, and
            the batch) or ``"first"`` (the batch); ``"none"`` if none is open.
        dynamic_axes: the dimensions that are open in the file, by input; all others have the example's size.
        opset: the ONNX operator set.
        errors: one entry for each output on each input that the file was verified on.
        not_verified: inputs that the file could not be verified on, because the model itself refuses them.
        fold: rounding errors of the fold, if adapters were folded.
        attempts: the strategies in the order tried, the last one successful.
        frozen: what is constant in the file: buffers that a call of the model changes, and branches and loops on
            values, by their lines or the TorchScript exporter's warnings, none of which changed a verified output.
        casts: operators that run in float32, because onnxruntime lacks them for the model's dtype.
        drawing: nodes of the file that draw random numbers; for the comparison both sides were given the same ones.
        adapters: ``"merged"``, ``"runtime"``, or ``"none"`` for a model without adapters.
        sizes: the sizes of each input; those of open dimensions are names, such as ``"batch"``.
        left_out: inputs that no output depends on, and a loss with the labels that only it needs.
        samples: how the file does on the samples that were given; for run-time adapters, alone and with them.
        untaken: branches on values (``torch.cond``) that no input takes that the file was verified on; those inside of
            loops and of other branches are not looked at.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: str
    dynamic_axes: Mapping[str, tuple[int, ...]]
    opset: int
    errors: tuple[OutputError, ...]
    not_verified: tuple[str, ...]
    fold: FoldReport | None
    attempts: tuple[ExportAttempt, ...] = ()
    frozen: tuple[str, ...] = ()
    casts: tuple[str, ...] = ()
    drawing: int = 0
    adapters: str = "none"
    sizes: Mapping[str, tuple[int | str, ...]] = dataclasses.field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    samples: tuple[SampleReport, ...] = ()
    untaken: tuple[str, ...] = ()

    @property
    def strategy(self) -> str:
        """The strategy that wrote the file."""
        return self.attempts[-1].strategy if self.attempts else ""

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference between onnxruntime and PyTorch over all checks."""
        return max((error.max_abs for error in self._all_errors()), default=0.0)

    @property
    def max_rel_error(self) -> float:
        """Largest difference relative to the largest value of its output, over all checks."""
        return max((error.max_rel for error in self._all_errors()), default=0.0)

    @property
    def cases(self) -> tuple[str, ...]:
        """The inputs that the file was verified on."""
        return tuple(dict.fromkeys(error.case for error in self.errors))

    def _all_errors(self) -> Iterator[OutputError | SampleError]:
        yield from self.errors
        for report in self.samples:
            yield from report.errors

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data for JSON."""
        data = dataclasses.asdict(self)
        fold = None if self.fold is None else {"rounding_error": dict(self.fold.rounding_error)}
        derived = {"strategy": self.strategy, "cases": self.cases}
        largest = {"max_abs_error": self.max_abs_error, "max_rel_error": self.max_rel_error}
        return {**data, "path": str(self.path), "fold": fold, **derived, **largest}

    def rows(self) -> str:
        """The error of each output on each input, as a table to print."""
        table = Table(title=f"{self.path}: verified on {len(self.cases)} inputs", title_justify="left")
        for heading in ("input", "output"):
            table.add_column(heading)
        for heading in ("max abs error", "max rel error", "argmax agrees"):
            table.add_column(heading, justify="right")
        for error in self.errors:
            agreement = "" if error.argmax_agreement is None else f"{error.argmax_agreement:.1%}"
            table.add_row(error.case, error.output, f"{error.max_abs:.1e}", f"{error.max_rel:.1e}", agreement)
        return _render(table)

    def __str__(self) -> str:
        return _render(self)

    def __rich_console__(self, console: Console, options: Any) -> Any:
        yield from map(Text, self._describe())

    def _describe(self) -> Iterator[str]:
        """The summary; errors on single inputs are in :meth:`rows`."""
        yield f"{self.path}: verified on {len(self.cases)} inputs"
        for output in dict.fromkeys(error.output for error in self.errors):
            own = [error for error in self.errors if error.output == output]
            worst, share = max(own, key=lambda error: error.max_abs), find_least_agreement(own)
            agreement = "" if share is None else f", argmax agrees on at least {share:.1%}"
            yield (
                f"output {output}: error up to {worst.max_abs:.1e} ({worst.max_rel:.1e} of the largest value), on "
                f"{worst.case}{agreement}"
            )
        for report in self.samples:
            yield from report.describe()
        yield f"exported by {self.strategy.partition(',')[0]}, opset {self.opset}"
        if not any(self.dynamic_axes.values()):
            yield "open dimensions: none; all have the example's size"
        for name, sizes in self.sizes.items():
            yield f"input {name}: {' × '.join(map(str, sizes)) or 'one value'}"
        if self.left_out:
            yield f"left out, because inference does not need them: {', '.join(self.left_out)}"
        yield from (f"tried before: {a.strategy}: {a.reason}" for a in self.attempts if a.reason is not None)
        yield from (f"not verified on {case}: the model itself refuses it" for case in self.not_verified)
        yield from (f"not verified: {branch}; no input takes it" for branch in self.untaken)
        yield from (f"frozen: {what}" for what in self.frozen)
        if self.casts:
            yield f"run in float32, because onnxruntime has no other kernel: {', '.join(self.casts)}"
        if self.drawing:
            yield f"{self.drawing} nodes draw random numbers; for the comparison both sides were given the same ones"


def find_least_agreement(errors: Sequence[OutputError]) -> float | None:
    """The smallest argmax agreement over all outputs and inputs, if any output has rows."""
    values = [error.argmax_agreement for error in errors if error.argmax_agreement is not None]
    return min(values, default=None)


def _render(what: Any) -> str:
    console = Console(file=io.StringIO(), width=140, record=True)
    console.print(what)
    return console.export_text()
