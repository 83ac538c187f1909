"""Give adapters a start that was learned from data: LoRA-GA, gradient SVD, EVA.

lora_ga        both factors from the averaged gradient; the frozen weight is shifted (arXiv 2407.05000)
gradient_svd   P, Q from the averaged gradient, λ = 0; the frozen weight is untouched
eva            A or Q from the inputs of the layer; the frozen weight is untouched (arXiv 2410.07170)
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
from adapter_compiler.config.start_options import DATA_STARTS
from adapter_compiler.config.validation import assert_boolean, assert_choice, assert_integer, assert_number
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import adopt_starts
from adapter_compiler.training.calibration.gradients import Loss, as_batches, assert_adapted, find_weight_gradients
from adapter_compiler.training.calibration.layer_inputs import watch_layer_inputs
from passes.forms import with_offset
from passes.planning.plan import AdapterPlan, PlannedAdapter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataStart:
    """How adapters are initialized from data.

    Attributes:
        method: ``"lora_ga"``, ``"gradient_svd"`` or ``"eva"``.
        at_once: how many gradients memory may hold; with 1 each weight costs a pass over the batches.
        iterations: power iterations of a randomized decomposition of gradients; ``None`` for an exact one.
        stable_gamma: γ of LoRA-GA, whose factors are multiplied by d_out^(1/4)/√γ.
        use_sign: for ``"gradient_svd"``, decompose the gradient's sign, which is where Adam's first step goes.

    Raises:
        ConfigError: a value cannot work.
    """

    method: str = dataclasses.field(metadata={"example": "lora_ga"})
    at_once: int = 1
    iterations: int | None = None
    stable_gamma: float = 16.0
    use_sign: bool = False

    def __post_init__(self) -> None:
        assert_choice(self, "method", DATA_STARTS)
        assert_integer(self, "at_once", least=1)
        if self.iterations is not None:
            assert_integer(self, "iterations", least=0)
        assert_number(self, "stable_gamma", above=0)
        assert_boolean(self, "use_sign")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteStart:
    """What was found at one weight.

    Attributes:
        values: for each rank, σ of the gradient, or the share of the variance of the inputs (EVA).
        left_over: the share of ‖G‖² that the first step cannot follow (LoRA-GA, gradient SVD), or of the variance of
            the inputs that lies outside the directions (EVA).
    """

    values: tuple[float, ...]
    left_over: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitializationReport:
    """What :func:`initialize_adapters` found.

    Attributes:
        method: how.
        sites: by weight.
    """

    method: str
    sites: Mapping[str, SiteStart]

    def ranking(self) -> list[tuple[str, int, float]]:
        """All ranks of all sites as (site, number, value), the greatest value first: which of them promise most."""
        entries = [(name, i, value) for name, site in self.sites.items() for i, value in enumerate(site.values)]
        return sorted(entries, key=lambda entry: -entry[2])


def initialize_adapters(
    adapted: AdaptedModel, start: DataStart | str, batches: Iterable[Any], loss: Loss
) -> InitializationReport:
    """Start the adapters from data. Outputs stay those of the base model within rounding.

    To be called before training: what the adapters have learned is lost, and what an optimizer knows of them is
    about other values. Parameters keep their identity, so an optimizer and a ``RankBudget`` may exist already.

    Args:
        adapted: the model, in the mode that it is to be looked at in.
        start: the method by name, or with options.
        batches: a few of them, each what ``loss`` takes.
        loss: ``loss(model, batch)`` gives the loss; for EVA it is enough that it calls the model.

    Returns:
        What was found at each weight.

    Raises:
        ConfigError: the method is unknown, or there is no batch.
        SiteError: the loss does not depend on a weight, or its inputs or gradient are not to be had.
    """
    options = start if isinstance(start, DataStart) else DataStart(method=start)
    assert_adapted(adapted, "initialize_adapters")
    collected = as_batches(batches)
    _give_forms(adapted, shifted=options.method == "lora_ga")
    drawn = (_draw_from_inputs if options.method == "eva" else _draw_from_gradients)(adapted, options, collected, loss)
    sites = {}
    for adapter, factors, found in drawn:
        weight = adapted.base_weight(adapter.site.weight)
        write_start(adapter, adapted.adapters.parameters_of(adapter), weight, factors)
        sites[adapter.site.name] = found
    logger.info("%s: %d sites started from %d batches", options.method, len(sites), len(collected))
    return InitializationReport(method=options.method, sites=sites)


def _give_forms(adapted: AdaptedModel, *, shifted: bool) -> None:
    """Let the adapters keep where they start where that is not ΔW = 0, and only there."""
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
                f"least as many as the rank {adapter.rank}; give more of them"
            )
        explained = inputs.explained
        start = SiteStart(values=tuple(explained.tolist()), left_over=max(0.0, 1 - float(explained.sum())))
        yield adapter, StartingFactors(left=None, right=inputs.components), start


def decompose_layer_inputs(
    adapted: AdaptedModel, batches: Any, call: Loss, counts: Mapping[str, int]
) -> dict[str, IncrementalSvd]:
    """The right singular vectors of the inputs of each adapted weight, as many as ``counts`` says, at least one."""
    found = {adapter.site.name: IncrementalSvd(max(1, counts[adapter.site.name])) for adapter in adapted.plan}
    watch_layer_inputs(adapted, batches, call, lambda site, rows: found[site].add(rows))
    return found


def _left_over(values: torch.Tensor, total: float) -> float:
    return max(0.0, 1 - float(values.square().sum()) / total) if total else 0.0


__all__ = ["DataStart", "InitializationReport", "SiteStart", "decompose_layer_inputs", "initialize_adapters"]
