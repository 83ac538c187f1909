"""The file of a training state: its format, and the checks that it fits the objects of a run. It changes no object."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import explained, find_kept, find_targets, match_starts
from adapter_compiler.saving.fit_tensors import Kind, assert_same_dtypes, fit_tensors
from adapter_compiler.saving.primitives.adapter_file import SITES, read_sites
from adapter_compiler.saving.primitives.file_format import FileFormat, read_file
from adapter_compiler.saving.primitives.plain_data import decode
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.resuming.base_weights import assert_same_base, describe_base
from adapter_compiler.training.resuming.inactive_adapters import (
    ADAPTERS_FIELD,
    SavedAdapter,
    assert_same_adapters,
    fit_inactive,
)
from adapter_compiler.training.resuming.optimizer_state import ADVICE, assert_optimizer_fits
from passes.planning.compact_plan import compact_plan
from passes.planning.json_schema import Field, Source, check_object, is_object_of, is_text, show
from passes.planning.plan import AdapterPlan

#: Name of the file in the folder given to ``save_training_state``.
TRAINING_FILE = "training_state.safetensors"

_OBJECT = Field(expected="an object", fits=lambda value: isinstance(value, dict))

#: The nested states of a file.
_STATES: Mapping[str, Field] = {
    "gradients": _OBJECT,
    "optimizer": _OBJECT,
    "budget": Field(expected="an object or null", fits=lambda value: value is None or isinstance(value, dict)),
    "others": _OBJECT,
    "random": _OBJECT,
}

#: The prefix of the names of the model's tensors.
VALUES = "values."

FORMAT = FileFormat(
    kind="training state",
    version=1,
    writer="save_training_state",
    schema={
        "sites": SITES,
        "state": _OBJECT,
        # Files of earlier versions do not have the following keys; then they are not compared.
        "torch": Field(expected="the version of torch", fits=is_text, required=False),
        "base": Field(expected="text by weight", fits=is_object_of(is_text), required=False),
        "optimizer": dataclasses.replace(_OBJECT, required=False),
        "adapters": ADAPTERS_FIELD,
    },
)


class Stateful(Protocol):
    """An object with a state: a GradScaler, a learning-rate scheduler, a data loader that can resume."""

    def state_dict(self) -> dict[str, Any]:
        """The state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Load a state."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedState:
    """The contents of a file that fits.

    Attributes:
        plan: the model's plan with the forms of the file.
        kept: for each site with fewer triplets in the file, the indices to keep.
        values: the values of :func:`~adapter_compiler.saving.adapters.find_saved_tensors`.
        inactive: the inactive adapters by name.
        state: the nested states by name: gradients, optimizer, budget, others, random.
    """

    plan: AdapterPlan
    kept: Mapping[str, torch.Tensor]
    values: Mapping[str, torch.Tensor]
    inactive: Mapping[str, SavedAdapter]
    state: Mapping[str, Any]


def read_fitting(
    path: Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> SavedState:
    """Read the file and check it against the objects, which are not changed.

    Raises:
        CheckpointError: the file is missing or damaged, or does not fit one of the objects.
    """
    header, tensors = read_file(path, FORMAT)
    assert_fits_model(path, header, adapted, describe_base(adapted))
    return check_state(path, header, tensors, adapted, optimizer, budget, others)


def assert_fits_model(path: Path, header: Mapping[str, Any], adapted: AdaptedModel, base: Mapping[str, str]) -> None:
    """Raise :class:`CheckpointError` unless a header belongs to the adapters and to the frozen weights of a model.

    Args:
        path: the file, for messages.
        header: its header.
        adapted: the model.
        base: its frozen weights, as :func:`~adapter_compiler.training.resuming.base_weights.describe_base` gives them.
    """
    sites = read_sites(path, header)
    assert_same_adapters(path, header.get("adapters"), adapted)
    find_kept(path, sites, match_starts(adapted.plan, sites))
    assert_same_base(path, header.get("base", {}), base)


def check_state(
    path: Path,
    header: Mapping[str, Any],
    tensors: dict[str, torch.Tensor],
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> SavedState:
    """Check a header and its tensors, which are taken out of ``tensors``, against the objects.

    Raises:
        CheckpointError: they do not fit one of the objects.
    """
    sites = read_sites(path, header)
    plan = match_starts(adapted.plan, sites)
    kept = find_kept(path, sites, plan)
    targets = find_targets(adapted, compact_plan(plan, kept))
    values = {name.removeprefix(VALUES): tensors.pop(name) for name in list(tensors) if name.startswith(VALUES)}
    inactive = fit_inactive(path, header.get("adapters"), tensors, adapted)
    state = _decode_states(path, header["state"], tensors)
    _assert_values_fit(path, values, state["gradients"], targets)
    source = Source(name=f"{path}: the state of the optimizer", error=CheckpointError, advice=ADVICE)
    assert_optimizer_fits(source, header.get("optimizer"), state["optimizer"], adapted, optimizer, targets)
    _assert_budget_fits(path, state["budget"], budget, kept)
    if odd := sorted(state["others"].keys() ^ others.keys()):
        raise CheckpointError(f"{path}: the state of {odd[0]!r} is on one side only; give the same objects as to save")
    for name, other in others.items():
        if isinstance(other, torch.optim.Optimizer):
            source = Source(name=f"{path}: the state of {name!r}", error=CheckpointError, advice=ADVICE)
            assert_optimizer_fits(source, None, state["others"][name], adapted, other, targets)
    _assert_random_states(path, state["random"])
    if tensors:
        raise CheckpointError(
            f"{path}: the tensor {show(min(tensors))} belongs to none of the states, expected a place for each; save "
            "the state again"
        )
    return SavedState(plan=plan, kept=kept, values=values, inactive=inactive, state=state)


def _decode_states(path: Path, saved: Mapping[str, Any], tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """The nested states of the file, with their types checked."""
    source = Source(name=str(path), error=CheckpointError, advice="save the state again")
    check_object(source, "its states", saved, _STATES)
    state = {}
    for name in _STATES:
        with explained(path, f"what was saved as {name!r}"):
            state[name] = decode(saved[name], tensors)
    return check_object(source, "its states", state, _STATES)


def _assert_values_fit(
    path: Path, values: Mapping[str, torch.Tensor], gradients: Mapping[str, Any], targets: Mapping[str, Kind]
) -> None:
    assert_same_dtypes(path, values, targets)
    fit_tensors(path, values, targets)
    for name, gradient in gradients.items():
        found = (tuple(gradient.shape), gradient.dtype) if isinstance(gradient, torch.Tensor) else type(gradient)
        if found != targets.get(name):
            expected = show(targets[name]) if name in targets else "no such parameter"
            raise CheckpointError(
                f"{path}: the gradient of {name} has {show(found)}, expected {expected}; save the state again"
            )


def _assert_budget_fits(path: Path, state: Any, budget: RankBudget | None, kept: Mapping[str, torch.Tensor]) -> None:
    if (state is None) != (budget is None):
        found, expected = ("no", "one") if state is None else ("a", "none")
        raise CheckpointError(f"{path} was saved with {found} budget, but {expected} was given")
    if budget is not None:
        with explained(path, "the state of the budget"):
            budget.assert_same_run(state, kept)


def _assert_random_states(path: Path, state: Mapping[str, Any]) -> None:
    """Load the states into separate generators, which accept the same states as the global ones."""
    with explained(path, "the states of the random generators"):
        torch.Generator().set_state(state["torch"])
        random.Random().setstate(state["python"])
        if "numpy" in state and "numpy" in sys.modules:
            name, keys, *rest = state["numpy"]
            sys.modules["numpy"].random.RandomState().set_state((name, keys.numpy().astype("uint32"), *rest))
        for device in state.get("cuda", ()):
            if not isinstance(device, torch.Tensor) or device.dtype != torch.uint8:
                raise CheckpointError(f"a state of CUDA is {show(device)}, expected a tensor of bytes")
