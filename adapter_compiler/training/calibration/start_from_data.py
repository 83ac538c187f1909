"""Initialize adapters from data: LoRA-GA, gradient SVD, LoRA-One, EVA.

lora_ga        both factors from the averaged gradient; the start is subtracted from the weight (arXiv 2407.05000)
gradient_svd   P and Q from the averaged gradient, λ = 0; ΔW = 0
lora_one       P and Q from the averaged gradient: the first step along it is taken (arXiv 2502.01235)
eva            A or Q from the inputs of the layer; ΔW = 0 (arXiv 2410.07170)
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch

from adapter_compiler.adapters.initializers import StartingFactors, write_start
from adapter_compiler.adapters.initializers.eva import IncrementalSvd
from adapter_compiler.adapters.initializers.gradient_svd import draw_gradient_svd
from adapter_compiler.adapters.initializers.lora_ga import draw_lora_ga
from adapter_compiler.adapters.initializers.lora_one import draw_lora_one
from adapter_compiler.adapters.reports import ShownInNotebooks
from adapter_compiler.config.progress import progress
from adapter_compiler.config.start_options import DATA_STARTS
from adapter_compiler.config.validation import assert_boolean, assert_choice, assert_integer, assert_number
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import adopt_starts
from adapter_compiler.training.calibration.gradients import (
    Loss,
    as_batches,
    assert_adapted,
    assert_matrices,
    find_weight_gradients,
    tell_batches,
)
from adapter_compiler.training.calibration.layer_inputs import watch_layer_inputs
from passes.forms import with_offset
from passes.planning.plan import AdapterPlan, PlannedAdapter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStart:
    """The options of initializing adapters from data.

    Attributes:
        method: ``"lora_ga"``, ``"gradient_svd"``, ``"lora_one"`` or ``"eva"``.
        at_once: the number of gradients in memory at once; with 1, each weight needs a pass over the batches.
        iterations: power iterations of a randomized decomposition of gradients; ``None`` for an exact decomposition.
        stable_gamma: γ of LoRA-GA, whose factors are multiplied by d_out^(1/4)/√γ (theorem 3.2).
        step_size: for ``"lora_one"``, η: the largest singular value of ΔW / s at the start.
        use_sign: for ``"gradient_svd"``, decompose the sign of the gradient, the direction of Adam's first step.

    Raises:
        ConfigError: a value cannot work.
    """

    method: str = dataclasses.field(metadata={"example": "lora_ga"})
    at_once: int = 1
    iterations: int | None = None
    stable_gamma: float = 16.0
    step_size: float = 0.1
    use_sign: bool = False

    def __post_init__(self) -> None:
        assert_choice(self, "method", DATA_STARTS)
        assert_integer(self, "at_once", least=1)
        if self.iterations is not None:
            assert_integer(self, "iterations", least=0)
        assert_number(self, "stable_gamma", above=0)
        assert_number(self, "step_size", above=0)
        assert_boolean(self, "use_sign")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteStart:
    """What was measured at one weight.

    Attributes:
        values: for each rank, the singular value σ of the gradient, or the share of the inputs' variance (EVA).
        left_over: the share of ‖G‖² that the first step cannot follow (from gradients), or the share of the
            inputs' variance that is outside the chosen directions (EVA).
    """

    values: tuple[float, ...]
    left_over: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitializationReport(ShownInNotebooks):
    """The result of :func:`initialize_adapters`.

    Attributes:
        method: the method.
        sites: what was measured, by the site's name.
    """

    method: str
    sites: Mapping[str, SiteStart]

    def __str__(self) -> str:
        head = f"{self.method}: {len(self.sites)} sites; share left over, and the value of each rank"
        rows = (
            f"{found.left_over:7.1%}  {name}: {', '.join(f'{value:.3g}' for value in found.values)}"
            for name, found in self.sites.items()
        )
        return "\n".join([head, *rows])

    def ranking(self) -> list[tuple[str, int, float]]:
        """All ranks of all sites as (site, index, value), with the largest value first."""
        entries = [(name, i, value) for name, site in self.sites.items() for i, value in enumerate(site.values)]
        return sorted(entries, key=lambda entry: -entry[2])


def initialize_adapters(
    adapted: AdaptedModel, start: DataStart | str, batches: Iterable[Any], loss: Loss
) -> InitializationReport:
    """Initialize the adapters from data. Outputs are those of the base model within rounding, except after LoRA-One.

    Call it before training, because it overwrites what the adapters have learned. The Parameter objects stay the same,
    so an optimizer and a ``RankBudget`` may already exist.

    Args:
        adapted: the model; it runs in its present training mode.
        start: the method's name, or the options.
        batches: a few batches, in the form that ``loss`` takes.
        loss: ``loss(model, batch)`` returns the loss of a batch; for EVA it only needs to call the model.

    Returns:
        What was measured at each weight.

    Raises:
        ConfigError: the method is unknown, there is no batch, or too few rows of inputs (EVA).
        SiteError: the loss does not depend on a weight, its gradient is not finite, or no operator with the weight was
            seen (EVA).
    """
    options = start if isinstance(start, DataStart) else DataStart(method=start)
    assert_adapted(adapted, "initialize_adapters")
    assert_matrices(adapted, "initialize_adapters")
    collected = as_batches(batches)
    _give_forms(adapted, shifted=options.method == "lora_ga")
    sites = {}
    with progress(f"start by {options.method}"):
        draw = _draw_from_inputs if options.method == "eva" else _draw_from_gradients
        for adapter, factors, found in draw(adapted, options, collected, loss):
            weight = adapted.base_weight(adapter.site.weight)
            write_start(adapter, adapted.adapters.parameters_of(adapter), weight, factors)
            sites[adapter.site.name] = found
    logger.info("%s: initialized %d sites from %d batches", options.method, len(sites), len(collected))
    return InitializationReport(method=options.method, sites=sites)


def _give_forms(adapted: AdaptedModel, *, shifted: bool) -> None:
    """Give the adapters forms that keep and subtract their start if it is ΔW ≠ 0, else forms that do not."""
    adapters = [
        dataclasses.replace(
            adapter, form=with_offset(adapter.form, adapter.rank) if shifted and adapter.rank else adapter.form.core
        )
        for adapter in adapted.plan
    ]
    adopt_starts(adapted, AdapterPlan(adapters=tuple(adapters)))


Drawn = Iterator[tuple[PlannedAdapter, StartingFactors, SiteStart]]


def _draw_from_gradients(adapted: AdaptedModel, options: DataStart, batches: Any, loss: Loss) -> Drawn:
    for adapter, gradient in find_weight_gradients(adapted, batches, loss, at_once=options.at_once):
        if not adapter.rank:
            continue
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        if options.method == "lora_ga":
            factors, left_over = draw_lora_ga(
                adapter, wide, stable_gamma=options.stable_gamma, iterations=options.iterations
            )
            values = torch.linalg.vector_norm(wide @ factors.right.mT, dim=0)
        elif options.method == "lora_one":
            factors, values = draw_lora_one(adapter, wide, step_size=options.step_size, iterations=options.iterations)
            left_over = _left_over(values, float(wide.square().sum()))
        else:
            wide = wide.sign() if options.use_sign else wide
            factors, values = draw_gradient_svd(adapter, wide, iterations=options.iterations)
            left_over = _left_over(values, float(wide.square().sum()))
        yield adapter, factors, SiteStart(values=tuple(values.tolist()), left_over=left_over)


def _draw_from_inputs(adapted: AdaptedModel, options: DataStart, batches: Any, loss: Loss) -> Drawn:
    found = decompose_layer_inputs(adapted, batches, loss, {a.site.name: a.rank for a in adapted.plan})
    for adapter in adapted.plan:
        inputs = found[adapter.site.name]
        if not adapter.rank:
            continue
        if len(inputs.components) < adapter.rank:
            raise ConfigError(
                f"site {adapter.site.name}: the batches have only {len(inputs.components)} rows of inputs, expected at "
                f"least as many as the rank {adapter.rank}; give more batches"
            )
        explained = inputs.explained
        start = SiteStart(values=tuple(explained.tolist()), left_over=max(0.0, 1 - float(explained.sum())))
        yield adapter, StartingFactors(left=None, right=inputs.components), start


def decompose_layer_inputs(
    adapted: AdaptedModel, batches: Any, call: Loss, counts: Mapping[str, int]
) -> dict[str, IncrementalSvd]:
    """The right singular vectors of the inputs of each adapted weight.

    Args:
        adapted: the model.
        batches: the batches, in the form that ``call`` takes.
        call: ``call(model, batch)`` runs one batch.
        counts: the number of vectors for each site; at least one is computed.
    """
    found = {adapter.site.name: IncrementalSvd(max(1, counts[adapter.site.name])) for adapter in adapted.plan}
    call = tell_batches(call, len(batches))
    watch_layer_inputs(adapted, batches, call, lambda site, rows: found[site].add(rows))
    return found


def _left_over(values: torch.Tensor, total: float) -> float:
    return max(0.0, 1 - float(values.square().sum()) / total) if total else 0.0


__all__ = ["DataStart", "InitializationReport", "SiteStart", "decompose_layer_inputs", "initialize_adapters"]
