"""The state of a budget as plain data and tensors by site, independent of the layout of triplet buffers."""

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
from passes.planning.json_schema import Field, Source, check_object, is_count, is_finite, is_object_of, show

STATE_VERSION = 1

_ORDER = ("lam", "P", "Q")

_SOURCE = Source(name="budget state", error=CheckpointError, advice="give a state from RankBudget.state_dict()")

_STATE: Mapping[str, Field] = {
    "version": Field(expected=str(STATE_VERSION), fits=is_count),
    "step": Field(expected="a number of steps, 0 or more", fits=is_count),
    "schedule": Field(expected="an object of options", fits=lambda value: isinstance(value, dict)),
    "gamma": Field(expected="a finite number, 0 or more", fits=lambda value: is_finite(value) and value >= 0),
    "initial": Field(expected="a number of triplets or parameters", fits=is_count),
    "history": Field(expected="a list of maskings", fits=lambda value: isinstance(value, list)),
    "sites": Field(expected="an object of sites", fits=lambda value: isinstance(value, dict)),
}

_RECORD: Mapping[str, Field] = {
    "step": Field(expected="a number of steps", fits=is_count),
    "budget": Field(expected="a number of triplets or parameters", fits=is_count),
    "ranks": Field(expected="numbers of triplets by site", fits=is_object_of(is_count)),
    "live": Field(expected="a number of triplets", fits=is_count),
    "loss": Field(expected="null or a number", fits=lambda value: value is None or type(value) in (int, float)),
}

#: What states of earlier versions do not say of a site.
_OPTIONAL = ("origin",)


class HasBudgetState(Protocol):
    """The part of a :class:`~adapter_compiler.RankBudget` that is saved."""

    schedule: BudgetSchedule
    step: int
    history: list[MaskingRecord]
    _triplets: TripletBuffers
    _mask: torch.Tensor
    _origin: dict[str, torch.Tensor]
    _metric: Metric
    _importance: SiteImportance
    _growth: GrowthTracker | None
    _gamma: float | None
    _initial: int
    _target: int

    @property
    def gamma(self) -> float:
        """The weight γ of the regularizer."""

    def _set_mask(self, mask: torch.Tensor) -> None: ...


def dump_state(budget: HasBudgetState) -> dict[str, Any]:
    """The state: step, schedule, history, and for each site the mask, the metric's statistics and the growth scores."""
    triplets = budget._triplets
    masks = budget._mask.split(triplets.sizes)
    sites: dict[str, dict[str, Any]] = {
        site: {"mask": mask.clone(), "origin": budget._origin[site], "site_importance": importance}
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
    """Restore a state from :func:`dump_state`. Nothing changes if it does not fit.

    Raises:
        CheckpointError: the state has another version, schedule, sites or shapes.
    """
    triplets = budget._triplets
    assert_same_run(budget, state)
    sites = [state["sites"][site] for site in triplets.sites]
    for name, buffers in budget._metric.buffers.items():
        views = triplets.views(buffers)
        for site, saved in zip(triplets.sites, sites, strict=True):
            for letter, tensor in zip(_ORDER, saved[name], strict=True):
                views[site, letter].copy_(tensor)
    if budget._growth is not None:
        budget._growth.growth.copy_(torch.cat([saved["growth"] for saved in sites]))
    # States of earlier versions do not have it.
    budget._origin = {site: one.get("origin", budget._origin[site]) for site, one in state["sites"].items()}
    budget._importance.values = [float(saved["site_importance"]) for saved in sites]
    budget._set_mask(torch.cat([saved["mask"].to(triplets.device) for saved in sites]))
    budget._gamma = state["gamma"]
    budget._initial = state["initial"]
    budget._target = budget.schedule.target_triplets(len(triplets.sites), budget._initial)
    budget.step = state["step"]
    budget.history = [MaskingRecord(**record) for record in state["history"]]


def assert_same_run(
    budget: HasBudgetState, state: Mapping[str, Any], kept: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Raise :class:`CheckpointError` unless a state fits a budget.

    Args:
        budget: the budget.
        state: the state.
        kept: for each site that will be compacted before the state is restored, the triplets that it keeps.
    """
    mine = dump_state(budget)
    version = state.get("version")
    if version != STATE_VERSION:
        raise CheckpointError(
            f"budget state has version {show(version)}, expected {STATE_VERSION}; give a state from "
            "RankBudget.state_dict()"
        )
    check_object(_SOURCE, "", state, _STATE)
    for number, record in enumerate(state["history"]):
        check_object(_SOURCE, f"history {number}", record, _RECORD)
    for key, value in mine["schedule"].items():
        if state["schedule"].get(key) != value:
            raise CheckpointError(
                f"budget state was made with {key}={state['schedule'].get(key)!r}, this budget has {key}={value!r}; "
                "resume with the same BudgetSchedule"
            )
    if odd := sorted(mine["sites"].keys() ^ state["sites"].keys()):
        side = "the state" if odd[0] in state["sites"] else "this model"
        raise CheckpointError(f"budget state belongs to other sites: {odd[0]} is in {side} only; compile the same ones")
    for site, own in mine["sites"].items():
        rank = budget._triplets.shapes[site][-1]
        _assert_site_fits(site, state["sites"][site], own, (rank, len((kept or {}).get(site, range(rank)))))


#: Old and new rank of a site.
_Ranks = tuple[int, int]


def _assert_site_fits(site: str, state: Any, own: Mapping[str, Any], ranks: _Ranks) -> None:
    found = {key: _describe(value) for key, value in state.items()} if isinstance(state, Mapping) else show(state)
    expected = {key: _describe(value, ranks) for key, value in own.items() if key in found or key not in _OPTIONAL}
    if found != expected:
        raise CheckpointError(
            f"budget state at site {site} has {found}, this model has {expected}; compile with the same rank. A state "
            "saved after compaction is loaded with load_training_state, which compacts first"
        )


def _describe(value: Any, ranks: _Ranks = (1, 1)) -> Any:
    """The shapes and types of the statistics of a site, after a change of its rank from the first to the second."""
    old, new = ranks
    if isinstance(value, list) and len(value) == len(_ORDER) and all(isinstance(one, torch.Tensor) for one in value):
        lam, P, Q = (list(one.shape) for one in value)
        if ranks != (1, 1):
            lam[-1:], P[-1:], Q[-2:-1] = [new], [new], [new]
        return [(*shape, _find_kind(one)) for shape, one in zip((lam, P, Q), value, strict=True)]
    if isinstance(value, torch.Tensor):
        return (value.numel() * new // max(1, old), _find_kind(value)) if value.dim() == 1 else tuple(value.shape)
    return "number" if type(value) in (int, float) else show(value)


def _find_kind(tensor: torch.Tensor) -> str:
    return "bool" if tensor.dtype == torch.bool else "float" if tensor.is_floating_point() else str(tensor.dtype)
