"""Trial steps that leave no trace: model, optimizer, budget and random generators are put back bit for bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import note_model
from adapter_compiler.saving.primitives.snapshot import Snapshot
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.random_state import read_random_state, write_random_state

#: The package in which the classes of a budget's parts are defined.
_ROOM = "adapter_compiler.training."


@contextlib.contextmanager
def restored(adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> Iterator[Callable[[], None]]:
    """A context in which training steps may run; afterwards all is as it was, also if the block raises.

    Restored are the adapters, fully trained parameters, buffers, gradients, training modes and ranks; the optimizer
    with its moments and options; the rank budgets of the model; and the random generators of torch, Python and numpy.

    Yields:
        A function that puts everything back at once, so that the next trial starts from the same state.

    Raises:
        ConfigError: the optimizer does not hold all trainable parameters of the model.
    """
    _assert_holds(adapted, optimizer)
    generators = read_random_state()
    snapshot = Snapshot()
    budgets = [follower for follower in adapted.find_followers() if isinstance(follower, RankBudget)]
    for owner in (optimizer, *budgets, *(part for budget in budgets for part in _find_parts(budget))):
        snapshot.add_attributes(owner)
    note_model(snapshot, adapted)

    def put_back() -> None:
        snapshot.put_back()
        write_random_state(generators)

    try:
        yield put_back
    finally:
        put_back()


def _find_parts(budget: RankBudget) -> list[object]:
    return [part for part in vars(budget).values() if type(part).__module__.startswith(_ROOM)]


def _assert_holds(adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> None:
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    missing = [p for p in adapted.trainable_parameters() if p.numel() and id(p) not in held]
    if missing:
        raise ConfigError(
            f"the optimizer does not hold {len(missing)} of {len(adapted.trainable_parameters())} trainable parameters "
            "of the model, expected all of them; make it from adapted.trainable_parameters() while the adapter is "
            "active, or with adapted.make_optimizer"
        )
