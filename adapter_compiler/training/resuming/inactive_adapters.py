"""The inactive adapters in a training state: resuming a run with several adapters restores each of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import describe_sites, find_kept, find_saved_tensors, find_targets, match_starts
from adapter_compiler.saving.fit_tensors import assert_same_dtypes, fit_tensors
from adapter_compiler.saving.primitives.adapter_file import read_sites
from passes.planning.compact_plan import compact_plan
from passes.planning.json_schema import Field, Source, check_object, is_object_of, is_text
from passes.planning.plan import AdapterPlan

#: The prefix of the names of their tensors.
INACTIVE = "inactive."

#: What a header has under ``adapters``.
_SCHEMA: Mapping[str, Field] = {
    "active": Field(expected="the name of an adapter", fits=is_text),
    "inactive": Field(expected="sites by adapter", fits=is_object_of(lambda value: isinstance(value, dict))),
}

#: The field of a header.
ADAPTERS_FIELD = Field(
    expected="the active adapter and the inactive ones", fits=lambda value: isinstance(value, dict), required=False
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """An inactive adapter of a file that fits.

    Attributes:
        plan: the plan with the ranks and forms of the file.
        values: the values of :func:`~adapter_compiler.saving.adapters.find_saved_tensors`.
    """

    plan: AdapterPlan
    values: Mapping[str, torch.Tensor]


def describe_inactive(adapted: AdaptedModel) -> dict[str, Any]:
    """The name of the active adapter, and the sites of the inactive ones."""
    return {"active": adapted.active_adapter, "inactive": {n: describe_sites(adapted, n) for n in _names(adapted)}}


def find_inactive_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """The tensors of the inactive adapters, by their names in a file."""
    return {
        f"{INACTIVE}{name}.{key}": tensor
        for name in _names(adapted)
        for key, tensor in find_saved_tensors(adapted, name).items()
    }


def assert_same_adapters(path: Path, described: Any, adapted: AdaptedModel) -> None:
    """Raise :class:`CheckpointError` unless a model has the adapters of a header, and the same one is active.

    Args:
        path: the file, for messages.
        described: the result of :func:`describe_inactive` when it was saved; ``None`` if the file does not have it.
        adapted: the model.
    """
    if described is None:
        return
    source = Source(name=str(path), error=CheckpointError, advice="save the state again")
    check_object(source, "its adapters", described, _SCHEMA)
    active, mine = described["active"], adapted.active_adapter
    if active != mine:
        do = f"call use({active!r})" if active in adapted.adapter_names else f"call add_adapter and use for {active!r}"
        raise CheckpointError(
            f"{path}: adapter {active!r} was active when it was saved, {mine!r} is active in this model, expected the "
            f"same; {do} before the optimizer is made"
        )
    if odd := sorted(described["inactive"].keys() ^ set(_names(adapted))):
        side, do = ("this model", "remove") if odd[0] in adapted.adapter_names else ("the file", "add")
        raise CheckpointError(
            f"{path}: the inactive adapter {odd[0]!r} is in {side} only, expected the adapters of the saved run; "
            f"{do} it with {do}_adapter"
        )


def fit_inactive(
    path: Path, described: Any, tensors: dict[str, torch.Tensor], adapted: AdaptedModel
) -> dict[str, SavedAdapter]:
    """Check the inactive adapters of a file, whose tensors are taken out of ``tensors``, against the model's.

    Raises:
        CheckpointError: they have other sites, shapes, dtypes or larger ranks.
    """
    found = {}
    for name in _names(adapted) if described is not None else ():
        sites = read_sites(path, {"sites": described["inactive"][name]})
        plan = match_starts(adapted.adapter_set.plans[name], sites)
        plan = compact_plan(plan, find_kept(path, sites, plan))
        prefix = f"{INACTIVE}{name}."
        own = {key.removeprefix(prefix): tensors.pop(key) for key in list(tensors) if key.startswith(prefix)}
        targets = find_targets(adapted, plan, name)
        assert_same_dtypes(path, own, targets)
        found[name] = SavedAdapter(plan=plan, values=fit_tensors(path, own, targets))
    return found


@torch.no_grad()
def put_inactive(adapted: AdaptedModel, saved: Mapping[str, SavedAdapter]) -> None:
    """Give the inactive adapters their ranks and values; parameters keep their identity."""
    for name, adapter in saved.items():
        adapted.change_ranks(name, adapter.plan)
        for key, target in find_saved_tensors(adapted, name).items():
            target.copy_(adapter.values[key])


def _names(adapted: AdaptedModel) -> list[str]:
    return [name for name in adapted.adapter_names if name != adapted.active_adapter]
