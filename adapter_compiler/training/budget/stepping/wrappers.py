"""Find the model and the optimizers inside the wrappers of other libraries."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from adapter_compiler.errors import BudgetError

#: Attributes in which wrappers keep an optimizer: Accelerate, Lightning, schedulers, SAM, schedule-free wrappers.
_INNER = ("optimizer", "_optimizer", "base_optimizer", "base", "inner_optimizer")

#: Attributes in which wrappers keep a model: torch.compile; DDP and similar wrappers.
_MODULE = ("_orig_mod", "module")


def unwrap_model(model: object, cls: type) -> object:
    """The instance of ``cls`` inside DDP, ``torch.compile`` and similar wrappers; ``model`` itself if there is none."""
    found = model
    while isinstance(found, nn.Module) and not isinstance(found, cls):
        inside = [found._modules[name] for name in _MODULE if found._modules.get(name) is not None]
        if not inside:
            return model
        found = inside[0]
    return found


def find_optimizers(given: object) -> list[list[torch.optim.Optimizer]]:
    """The innermost optimizers, each followed by the optimizers that wrap it.

    Args:
        given: an optimizer, a wrapper or scheduler that contains one, or a sequence of these.

    Raises:
        BudgetError: one of them has no optimizer, or the sequence is empty.
    """
    wanted = list(given) if isinstance(given, Sequence) else [given]
    chains: dict[int, list[torch.optim.Optimizer]] = {}
    for one in wanted:
        layers = [layer for layer in _walk_inwards(one) if isinstance(layer, torch.optim.Optimizer)]
        layers = [layer for layer in layers if "state" in vars(layer)]  # Accelerate's shows that of the one inside
        if not layers:
            raise BudgetError(
                f"RankBudget(optimizer=...) is a {type(one).__name__}, expected Optimizer; give one over "
                "adapted.trainable_parameters(), or a list of those that hold them together"
            )
        chains.setdefault(id(layers[-1]), layers[::-1])
    if not chains:
        raise BudgetError(
            "RankBudget(optimizer=...) is an empty list, expected Optimizer; give one over "
            "adapted.trainable_parameters(), or a list of those that hold them together"
        )
    return list(chains.values())


def _walk_inwards(given: object) -> Iterator[object]:
    """A wrapper and the optimizers in it, down to the one that changes the parameters."""
    seen: set[int] = set()
    layer: object | None = given
    while layer is not None and id(layer) not in seen:
        seen.add(id(layer))
        yield layer
        attributes = getattr(layer, "__dict__", {})
        layer = next((attributes[name] for name in _INNER if _is_optimizer(attributes.get(name))), None)


def _is_optimizer(value: Any) -> bool:
    return isinstance(value, torch.optim.Optimizer) or (hasattr(value, "param_groups") and callable(value.step))


def assert_can_shrink(model: object, chains: Sequence[Sequence[torch.optim.Optimizer]]) -> None:
    """Raise :class:`BudgetError` if ``compact=True`` would fail, or give wrong results, at the freeze step.

    Args:
        model: the model, with its wrappers.
        chains: the optimizers, from :func:`find_optimizers`.
    """
    for optimizer in (one for chain in chains for one in chain):
        kind = type(optimizer).__name__
        reason = None
        if isinstance(optimizer, torch.optim.LBFGS):
            reason = "keeps one vector over all parameters"
        elif _has_state_of_8_bits(optimizer):
            reason = "keeps its state in blocks of 8-bit codes"
        if reason is not None:
            raise BudgetError(
                f"BudgetSchedule(compact=True): {kind} {reason}, which cannot be cut to fewer triplets; expected state "
                "of the parameters' shapes. Leave compact out and compact when training is over, or use AdamW"
            )
    assert_not_replicated(model)


def _has_state_of_8_bits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer keeps 8-bit codes for a parameter; bitsandbytes keeps plain state for small ones."""
    options = getattr(optimizer, "args", None)
    if "8bit" not in type(optimizer).__name__.lower() and getattr(options, "optim_bits", None) != 8:
        return False
    least = getattr(options, "min_8bit_size", 0)
    return any(p.numel() >= least for group in optimizer.param_groups for p in group["params"])


def assert_not_replicated(model: object) -> None:
    """Raise :class:`BudgetError` if DistributedDataParallel wraps the model; it would not notice changes of shapes."""
    if find_replica(model) is not None:
        raise BudgetError(
            "BudgetSchedule(compact=True): DistributedDataParallel holds the model and keeps the shapes that it was "
            "made with, so the ranks of the processes would drift apart; expected no wrapper that does. Leave compact "
            "out and call budget.compact() when training is over, or between two phases and wrap the model again"
        )


def find_replica(model: object) -> DistributedDataParallel | None:
    """The DistributedDataParallel that wraps a model, if there is one in this process."""
    parts = set(model.modules()) if isinstance(model, nn.Module) else set()
    around = next((part for part in parts if isinstance(part, DistributedDataParallel)), None)
    if around is not None or not parts:
        return around
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return None
    # A model has no reference to its wrappers, so all objects are searched: slow, but wrong training would be worse.
    for one in gc.get_objects():
        if issubclass(type(one), DistributedDataParallel) and any(part is model for part in one.modules()):
            found: DistributedDataParallel = one
            return found
    return None
