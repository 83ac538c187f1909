"""Restore everything that loading a training state has changed, if the load fails."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import explained, note_model
from adapter_compiler.saving.primitives.plain_data import copy_state, is_same_state
from adapter_compiler.saving.primitives.snapshot import Snapshot
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.random_state import read_random_state, write_random_state
from adapter_compiler.training.resuming.inactive_adapters import find_inactive_tensors
from adapter_compiler.training.resuming.optimizer_state import load_optimizer
from adapter_compiler.training.resuming.state_file import Stateful

#: The package in which the classes of a budget's parts are defined.
_ROOM = "adapter_compiler.training."


@contextlib.contextmanager
def all_or_nothing(
    path: Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> Iterator[None]:
    """A context that restores everything that loading a training state changes, if its block raises."""
    generators = read_random_state()
    before = Snapshot()
    for owner in (*_find_optimizers(optimizer, *others.values()), *_find_parts(budget)):
        before.add_attributes(owner)
    note_model(before, adapted)
    for tensor in find_inactive_tensors(adapted).values():
        before.add_tensor(tensor)
    states: dict[str, Any] = {}
    for name, other in others.items():
        with explained(path, f"the present state of {name!r}"):
            states[name] = copy_state(other.state_dict())
        before.add_attributes(other, levels=1)
    try:
        yield
    except BaseException:
        with contextlib.ExitStack() as stack:  # if one object cannot be restored, the others still are
            stack.callback(write_random_state, generators)
            for name, other in others.items():
                stack.callback(_put_back_other, path, name, other, states[name])
            stack.callback(before.put_back)
        raise


def load_other(other: Stateful, state: Any) -> None:
    """Load a state into an object."""
    if isinstance(other, torch.optim.Optimizer):
        load_optimizer(other, state)
    else:
        other.load_state_dict(state)


def _find_optimizers(*objects: object) -> list[torch.optim.Optimizer]:
    """The optimizers among the objects, and the optimizers that they wrap."""
    found = [one for one in objects if isinstance(one, torch.optim.Optimizer)]
    inner = [part for one in found for part in vars(one).values() if isinstance(part, torch.optim.Optimizer)]
    return [*found, *inner]


def _find_parts(budget: RankBudget | None) -> list[object]:
    """A budget and the objects that it consists of."""
    if budget is None:
        return []
    return [budget, *(part for part in vars(budget).values() if type(part).__module__.startswith(_ROOM))]


def _put_back_other(path: Path, name: str, other: Stateful, before: Any) -> None:
    """Load the earlier state into an object, unless restoring its attributes was enough.

    Raises:
        CheckpointError: the object does not accept its own state.
    """
    try:
        if not is_same_state(other.state_dict(), before):
            load_other(other, before)
    except Exception as error:
        raise CheckpointError(
            f"{path}: the state could not be taken over, and {name!r} ({type(other).__name__}) does not take back the "
            f"state that it had ({type(error).__name__}: {error}); everything else is restored; make {name!r} again"
        ) from error
