"""Start the named adapters of several tasks from all their gradients together, with one Q (or A) at each weight."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from adapter_compiler.adapters.initializers import write_start
from adapter_compiler.adapters.initializers.joint import draw_joint
from adapter_compiler.adapters.reports import ShownInNotebooks
from adapter_compiler.config.progress import progress
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import Loss, as_batches, assert_adapted, find_weight_gradients
from passes.forms import LoraForm, SvdForm
from passes.planning.plan import PlannedAdapter

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class JointStart(ShownInNotebooks):
    """The result of :func:`initialize_jointly`.

    Attributes:
        values: by site, the singular values of the stacked gradients, one for each rank.
        left_over: by adapter and site, the share of the task's ‖G‖² that is outside of the shared directions.
    """

    values: Mapping[str, tuple[float, ...]]
    left_over: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        rows = []
        for name, sites in self.left_over.items():
            mean = sum(sites.values()) / len(sites)
            rows.append(f"{name}: {mean:.1%} of the gradients is outside of the shared directions, on average")
        return "\n".join([f"joint start of {len(self.left_over)} adapters at {len(self.values)} sites", *rows])


def initialize_jointly(adapted: AdaptedModel, tasks: Mapping[str, Iterable[Any]], loss: Loss) -> JointStart:
    """Start several named adapters with a shared Q and a P for each task; ΔW = 0 for all of them.

    See :mod:`adapter_compiler.adapters.initializers.joint`. Call it before training, because it overwrites what the
    adapters have learned. The Parameter objects stay the same. The gradients of all tasks and weights are in memory.

    Args:
        adapted: the model, with an adapter of the kind ``"svd"`` or ``"lora"`` for each task, all over the same weights
            and with the same ranks. It runs in its present training mode.
        tasks: batches by the name of the adapter, in the form that ``loss`` takes; two tasks or more.
        loss: ``loss(model, batch)`` returns the loss of a batch.

    Returns:
        What was measured at each weight.

    Raises:
        ConfigError: there are fewer than two tasks, an adapter is unknown or does not fit the others, or a task has no
            batch.
        SiteError: the loss does not depend on a weight, or its gradient is not finite.
    """
    assert_adapted(adapted, "initialize_jointly")
    plans = _find_plans(adapted, tasks)
    collected = {name: as_batches(batches) for name, batches in tasks.items()}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    active = adapted.active_adapter
    with progress("joint start"):
        try:
            for name, batches in collected.items():
                adapted.use(name)  # so that each task runs with its own values of what trains fully
                found = find_weight_gradients(adapted, batches, loss, at_once=len(adapted.plan))
                gradients[name] = {adapter.site.name: _widen(gradient) for adapter, gradient in found}
        finally:
            adapted.use(active)
        values, left_over = {}, {name: {} for name in tasks}  # type: ignore[var-annotated]
        for site, adapters in plans.items():
            first = next(iter(adapters.values()))
            stacked = [gradients[name][site] for name in tasks]
            factors, outside, sizes = draw_joint(stacked, first.rank, has_lam=isinstance(first.form, SvdForm))
            for (name, adapter), own, share in zip(adapters.items(), factors, outside, strict=True):
                parameters = adapted.parameters_of_adapter(name).parameters_of(adapter)
                write_start(adapter, parameters, adapted.base_weight(adapter.site.weight), own)
                left_over[name][site] = share
            values[site] = tuple(sizes.tolist())
    logger.info("joint start of %d adapters at %d sites", len(tasks), len(values))
    return JointStart(values=values, left_over=left_over)


def _widen(gradient: torch.Tensor) -> torch.Tensor:
    return gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))


def _find_plans(adapted: AdaptedModel, tasks: object) -> dict[str, dict[str, PlannedAdapter]]:
    """The adapters of all tasks by site and name.

    Raises:
        ConfigError: they cannot be started together.
    """
    if not isinstance(tasks, Mapping) or len(tasks) < 2:
        raise ConfigError(
            f"initialize_jointly(tasks=...) is {type(tasks).__name__} of "
            f"{len(tasks) if isinstance(tasks, Mapping) else 'something else'}, expected batches of two adapters or "
            "more by name, as in {'first': batches, 'second': batches}; for one task, call initialize_adapters"
        )
    found: dict[str, dict[str, PlannedAdapter]] = {}
    for name in tasks:
        adapted.adapter_set.assert_known(name)
        for adapter in adapted.adapter_set.plans[name]:
            found.setdefault(adapter.site.name, {})[name] = adapter
    for site, adapters in found.items():
        kinds = {(type(a.form), a.rank) for a in adapters.values()}
        if len(adapters) < len(tasks) or len(kinds) > 1:
            ranks = ", ".join(f"{name}: {a.form.name!r} of rank {a.rank}" for name, a in adapters.items())
            raise ConfigError(
                f"initialize_jointly: site {site} has {ranks}; expected the same kind and rank in all {len(tasks)} "
                "adapters, which share a factor; add them with one configuration"
            )
        (one,) = {(type(a.form), a.form.name) for a in adapters.values()}
        if one[0] not in (SvdForm, LoraForm):
            raise ConfigError(
                f"initialize_jointly: site {site} has the form {one[1]!r}, expected 'svd' or 'lora'; add the adapters "
                "with AdapterConfig(kind='svd')"
            )
    return {site: adapters for site, adapters in found.items() if next(iter(adapters.values())).rank}
