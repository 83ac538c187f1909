"""Stop a training run anywhere and resume it bit for bit, by one file with everything that a step depends on.

The file is safetensors with JSON in its header. It has all adapters, fully trained parameters, buffers, accumulated
gradients, and the states of the optimizer, the budget, a GradScaler or scheduler, and the random generators. It is
written to a temporary file, which is then renamed, so a killed process leaves the old file or the new one, complete.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapter_compiler.adapters.compact import compact_adapters
from adapter_compiler.adapters.parameters.sharded import is_sharded
from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import (
    adopt_starts,
    assert_is_adapted,
    describe_sites,
    explained,
    find_saved_tensors,
    write_values,
)
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.primitives.plain_data import encode
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.random_state import read_random_state, write_random_state
from adapter_compiler.training.resuming.all_or_nothing import all_or_nothing, load_other
from adapter_compiler.training.resuming.base_weights import describe_base
from adapter_compiler.training.resuming.inactive_adapters import describe_inactive, find_inactive_tensors, put_inactive
from adapter_compiler.training.resuming.optimizer_state import describe_optimizer, load_optimizer
from adapter_compiler.training.resuming.state_file import (
    FORMAT,
    TRAINING_FILE,
    VALUES,
    SavedState,
    Stateful,
    read_fitting,
)


def save_training_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> Path:
    """Write ``directory/training_state.safetensors``; an earlier file is replaced only when the new one is complete.

    Args:
        directory: a folder; it is created if it does not exist.
        adapted: the model in training.
        optimizer: its optimizer.
        budget: its rank budget, if it has one.
        others: other objects with a state, by a name of your choice: ``scaler=scaler, scheduler=scheduler``.

    Returns:
        The path of the file.

    Raises:
        CheckpointError: a state has a value that is neither plain data nor a tensor.
    """
    path = Path(directory) / TRAINING_FILE
    _assert_nothing_is_sharded(path, adapted)
    header, tensors = collect_state(adapted, optimizer, budget, others, describe_base(adapted))
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=FORMAT.make_metadata(header, tensors))
    return path


def collect_state(
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
    base: Mapping[str, str],
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header of a training state, and copies of its tensors by name.

    Args:
        adapted: the model in training.
        optimizer: its optimizer.
        budget: its rank budget, if it has one.
        others: the other objects with a state.
        base: its frozen weights, as :func:`~adapter_compiler.training.resuming.base_weights.describe_base` gives them.

    Raises:
        CheckpointError: a state has a value that is neither plain data nor a tensor.
    """
    values = find_saved_tensors(adapted)
    held = {f"{VALUES}{name}": tensor for name, tensor in values.items()} | find_inactive_tensors(adapted)
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in held.items()}
    state = {
        "gradients": {name: t.grad for name, t in values.items() if t.grad is not None},
        "optimizer": optimizer.state_dict(),
        "budget": None if budget is None else budget.state_dict(),
        "others": {name: other.state_dict() for name, other in others.items()},
        "random": read_random_state(),
    }
    header = {
        "torch": torch.__version__,
        "sites": describe_sites(adapted),
        "adapters": describe_inactive(adapted),
        "base": dict(base),
        "optimizer": describe_optimizer(adapted, optimizer),
        "state": {name: encode(part, name, tensors) for name, part in state.items()},
    }
    return header, tensors


def load_training_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> None:
    """Resume from a file of :func:`save_training_state`.

    Compile the model and make the optimizer and the budget as at the start of the run. If the adapters were compacted
    when the state was saved, they are compacted here. The file is checked before anything changes. If one of the
    objects nevertheless refuses its state, everything is restored: parameters, buffers, gradients, ranks, the
    optimizer, the budget, the other objects and the random generators.

    An object of ``others`` is restored by its attributes, and by its own ``load_state_dict`` if they are not enough.
    Changes that it makes outside of both are not noticed.

    Args:
        directory: the folder that was given to ``save_training_state``.
        adapted: the model, compiled as in the saved run.
        optimizer: its optimizer, made as in the saved run.
        budget: its rank budget, if the saved run had one.
        others: the other objects, by the same names.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other sites, shapes, options or objects.
    """
    assert_is_adapted(adapted, "load_training_state")
    path = Path(directory) / TRAINING_FILE
    _assert_nothing_is_sharded(path, adapted)
    saved = read_fitting(path, adapted, optimizer, budget, others)
    with all_or_nothing(path, adapted, optimizer, budget, others):
        put_state(path, saved, adapted, optimizer, budget, others)


def _assert_nothing_is_sharded(path: Path, adapted: AdaptedModel) -> None:
    """Raise :class:`CheckpointError` if something that trains is sharded; one rank does not have it."""
    if found := [name for name, tensor in find_saved_tensors(adapted).items() if is_sharded(tensor)]:
        raise CheckpointError(
            f"{path}: {found[0].removeprefix('module.')} is trained fully and is a DTensor, expected a tensor that is "
            "whole; call save_training_state and load_training_state of what shard(adapted) returned, on every rank"
        )


def put_state(
    path: Path,
    saved: SavedState,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> None:
    """Give the objects the states of a file that fits them.

    Raises:
        CheckpointError: an object refuses its state; those before it have theirs.
    """
    with explained(path, "the adapters"):
        _put_model(adapted, optimizer, budget, saved)
    with explained(path, f"the state of the optimizer ({type(optimizer).__name__})"):
        load_optimizer(optimizer, saved.state["optimizer"])
    if budget is not None:
        with explained(path, "the state of the budget"):
            budget.load_state_dict(saved.state["budget"])
    for name, other in others.items():
        with explained(path, f"the state of {name!r} ({type(other).__name__})"):
            load_other(other, saved.state["others"][name])
    with explained(path, "the states of the random generators"):
        write_random_state(saved.state["random"])


def _put_model(
    adapted: AdaptedModel, optimizer: torch.optim.Optimizer, budget: RankBudget | None, saved: SavedState
) -> None:
    adopt_starts(adapted, saved.plan)
    if saved.kept and budget is not None:
        budget.shrink(saved.kept)
    elif saved.kept:
        compact_adapters(adapted, saved.kept, optimizer)
    write_values(adapted, saved.values)
    put_inactive(adapted, saved.inactive)
    gradients = saved.state["gradients"]
    for name, target in find_saved_tensors(adapted).items():
        if isinstance(target, torch.nn.Parameter):
            target.grad = gradients[name].to(target.device) if name in gradients else None


__all__ = ["TRAINING_FILE", "Stateful", "load_training_state", "save_training_state"]
