"""A budget's state as plain data and tensors, by site, independent of how the tensors stand in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.training.budget.masking_record import MaskingRecord
from adapter_compiler.training.budget.schedule import BudgetSchedule
from adapter_compiler.training.scoring.importance import SiteImportance
from adapter_compiler.training.scoring.metrics import GrowthTracker, Metric
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers

STATE_VERSION = 1

_ORDER = ("lam", "P", "Q")


class HasBudgetState(Protocol):
    """The part of a :class:`~adapter_compiler.RankBudget` that is saved."""

    schedule: BudgetSchedule
    step: int
    history: list[MaskingRecord]
    _triplets: TripletBuffers
    _mask: torch.Tensor
    _metric: Metric
    _importance: SiteImportance
    _growth: GrowthTracker | None
    _gamma: float | None
    _initial: int
    _target: int

    @property
    def gamma(self) -> float:
        """The regularizer's weight."""

    def _set_mask(self, mask: torch.Tensor) -> None: ...


def dump_state(budget: HasBudgetState) -> dict[str, Any]:
    """Step, schedule, history, and for each site the mask, the metric's statistics and the growth score."""
    triplets = budget._triplets
    masks = budget._mask.split(triplets.sizes)
    sites: dict[str, dict[str, Any]] = {
        site: {"mask": mask.clone(), "site_importance": importance}
        for site, mask, importance in zip(triplets.sites, masks, budget._importance.values, strict=True)
    }
    for name, buffers in budget._metric.buffers.items():
        views = triplets.views(buffers)
        for site in triplets.sites:
            sites[site][name] = [views[site, letter].clone() for letter in _ORDER]
    if budget._growth is not None:
        for site, growth in zip(triplets.sites, budget._growth.growth.split(triplets.sizes), strict=True):
            sites[site]["growth"] = growth.clone()
    return {
        "version": STATE_VERSION,
        "step": budget.step,
        "schedule": budget.schedule.to_dict(),
        "gamma": budget.gamma,
        "initial": budget._initial,
        "history": [dataclasses.asdict(record) for record in budget.history],
        "sites": sites,
    }


@torch.no_grad()
def restore_state(budget: HasBudgetState, state: Mapping[str, Any]) -> None:
    """Put a state from :func:`dump_state` into ``budget``, all of it or nothing.

    Raises:
        CheckpointError: other version, schedule, sites or shapes.
    """
    triplets = budget._triplets
    _assert_fits(budget, state)
    sites = [state["sites"][site] for site in triplets.sites]
    for name, buffers in budget._metric.buffers.items():
        views = triplets.views(buffers)
        for site, saved in zip(triplets.sites, sites, strict=True):
            for letter, tensor in zip(_ORDER, saved[name], strict=True):
                views[site, letter].copy_(tensor)
    if budget._growth is not None:
        budget._growth.growth.copy_(torch.cat([saved["growth"] for saved in sites]))
    budget._importance.values = [float(saved["site_importance"]) for saved in sites]
    budget._set_mask(torch.cat([saved["mask"].to(triplets.device) for saved in sites]))
    budget._gamma = state["gamma"]
    budget._initial = state["initial"]
    budget._target = budget.schedule.target_triplets(len(triplets.sites), budget._initial)
    budget.step = state["step"]
    budget.history = [MaskingRecord(**record) for record in state["history"]]


def assert_same_run(budget: HasBudgetState, state: Mapping[str, Any]) -> None:
    """Raise :class:`CheckpointError` if a state is of another version, schedule or other sites; ranks may differ."""
    mine = dump_state(budget)
    version = state.get("version")
    if version != STATE_VERSION:
        raise CheckpointError(
            f"budget state has version {version!r}, expected {STATE_VERSION}; give what RankBudget.state_dict() gave"
        )
    if missing := sorted(mine.keys() - state.keys()):
        raise CheckpointError(f"budget state has no {missing[0]!r}; give all that RankBudget.state_dict() gave")
    for key, value in mine["schedule"].items():
        if state["schedule"].get(key) != value:
            raise CheckpointError(
                f"budget state was made with {key}={state['schedule'].get(key)!r}, this budget has {key}={value!r}; "
                "resume with the same BudgetSchedule"
            )
    if odd := sorted(mine["sites"].keys() ^ state["sites"].keys()):
        side = "the state" if odd[0] in state["sites"] else "this model"
        raise CheckpointError(f"budget state belongs to other sites: {odd[0]} is in {side} only; compile the same ones")


def _assert_fits(budget: HasBudgetState, state: Mapping[str, Any]) -> None:
    assert_same_run(budget, state)
    for name, own in dump_state(budget)["sites"].items():
        found, expected = _shapes(state["sites"][name]), _shapes(own)
        if found != expected:
            raise CheckpointError(
                f"budget state at site {name} has shapes {found}, this model has {expected}; compile with the same "
                "rank. A state saved after compaction is loaded with load_training_state, which compacts first"
            )


def _shapes(site: Mapping[str, Any]) -> dict[str, list[tuple[int, ...]]]:
    """Shapes of all tensors of one site."""
    lists = {name: value if isinstance(value, list) else [value] for name, value in site.items()}
    tensors = {name: [t for t in found if isinstance(t, torch.Tensor)] for name, found in lists.items()}
    return {name: [tuple(t.shape) for t in found] for name, found in tensors.items() if found}
