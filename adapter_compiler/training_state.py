"""Stop a training run anywhere and go on bit for bit: one file with all that a step depends on.

The file is safetensors with JSON in its header: adapters, fully trained parameters, buffers, gradients that
are being accumulated, the optimizer's state, the budget's, those of a GradScaler or scheduler, and the random
generators'. It is written beside and renamed, so that a process that is killed leaves the file before or the
file after, never a part.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.budget import RankBudget
from adapter_compiler.checkpoint import (
    HEADER_KEY,
    adopt_starts,
    describe_sites,
    find_kept,
    find_saved_tensors,
    match_starts,
    read_file,
)
from adapter_compiler.compaction import compact_adapters
from adapter_compiler.errors import CheckpointError
from adapter_compiler.files import written_beside
from adapter_compiler.plain_data import decode, encode
from adapter_compiler.random_state import read_random_state, write_random_state

#: Name of the file in the folder given to :func:`save_training_state`.
TRAINING_FILE = "training_state.safetensors"

_KIND, _VERSION = "training state", 1


class Stateful(Protocol):
    """A GradScaler, a learning-rate scheduler, a data loader that can resume."""

    def state_dict(self) -> dict[str, Any]:
        """Its state."""

    def load_state_dict(self, state: dict[str, Any], /) -> Any:
        """Take over a state."""


def save_training_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> Path:
    """Write ``directory/training_state.safetensors``, replacing an earlier one only when complete.

    Args:
        directory: a folder; it is made if need be.
        adapted: the model in training.
        optimizer: its optimizer.
        budget: its rank budget, if it has one.
        others: whatever else has a state, by a name of your choice: ``scaler=scaler, scheduler=scheduler``.

    Returns:
        The file's path.

    Raises:
        CheckpointError: a state holds something that is neither plain data nor a tensor.
    """
    path = Path(directory) / TRAINING_FILE
    values = find_saved_tensors(adapted)
    tensors = {f"values.{name}": tensor.detach().contiguous().clone() for name, tensor in values.items()}
    state = {
        "gradients": {name: t.grad for name, t in values.items() if t.grad is not None},
        "optimizer": optimizer.state_dict(),
        "budget": None if budget is None else budget.state_dict(),
        "others": {name: other.state_dict() for name, other in others.items()},
        "random": read_random_state(),
    }
    header = {
        "kind": _KIND,
        "version": _VERSION,
        "torch": torch.__version__,
        "sites": describe_sites(adapted),
        "state": {name: encode(part, name, tensors) for name, part in state.items()},
    }
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata={HEADER_KEY: json.dumps(header), "format": "pt"})
    return path


def load_training_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> None:
    """Go on from what :func:`save_training_state` wrote.

    The model is compiled, the optimizer and the budget are made as at the start of the run; adapters that had
    been compacted when the state was saved are compacted here. Nothing changes if the state does not fit.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other sites, shapes, options or objects.
    """
    path = Path(directory) / TRAINING_FILE
    header, tensors = read_file(path, "save_training_state")
    if header.get("kind") != _KIND or header.get("version") != _VERSION:
        found = f"{header.get('kind')!r} of version {header.get('version')!r}"
        raise CheckpointError(f"{path} holds {found}, expected {_KIND!r} of version {_VERSION}")
    state = {name: decode(part, tensors) for name, part in header["state"].items()}
    plan = match_starts(adapted.plan, header["sites"])
    kept = find_kept(path, header["sites"], plan)
    adopt_starts(adapted, plan)
    values = {n.removeprefix("values."): t for n, t in tensors.items() if n.startswith("values.")}
    _assert_values_fit(path, values, adapted, kept)
    _assert_objects_fit(path, state, optimizer, budget, others)
    if kept and budget is not None:
        budget.shrink(kept)
    elif kept:
        compact_adapters(adapted, kept, optimizer)
    _put_values(adapted, values, state["gradients"])
    _put_optimizer(optimizer, state["optimizer"])
    if budget is not None:
        budget.load_state_dict(state["budget"])
    for name, other in others.items():
        other.load_state_dict(state["others"][name])
    write_random_state(state["random"])


def _assert_values_fit(
    path: Path, values: Mapping[str, torch.Tensor], adapted: AdaptedModel, kept: Mapping[str, torch.Tensor]
) -> None:
    targets = find_saved_tensors(adapted)
    if odd := sorted(targets.keys() ^ values.keys()):
        raise CheckpointError(f"{path}: tensor {odd[0]} is on one side only; compile with the same trainable=")
    for name, target in targets.items():
        site = name.removeprefix("adapters.").rpartition(".")[0]
        same_shape = values[name].shape == target.shape or (name.startswith("adapters.") and site in kept)
        if not same_shape or values[name].dtype != target.dtype:
            raise CheckpointError(
                f"{path}: {name} is {values[name].dtype} of shape {tuple(values[name].shape)}, this model has "
                f"{target.dtype} of shape {tuple(target.shape)}"
            )


def _assert_objects_fit(
    path: Path,
    state: Mapping[str, Any],
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    others: Mapping[str, Stateful],
) -> None:
    if (state["budget"] is None) != (budget is None):
        found, expected = ("no", "one") if state["budget"] is None else ("a", "none")
        raise CheckpointError(f"{path} was saved with {found} budget, but {expected} was given")
    if budget is not None:
        budget.assert_same_run(state["budget"])
    if odd := sorted(state["others"].keys() ^ others.keys()):
        raise CheckpointError(f"{path}: the state of {odd[0]!r} is on one side only; give the same objects as to save")
    saved = [len(group["params"]) for group in state["optimizer"]["param_groups"]]
    mine = [len(group["params"]) for group in optimizer.param_groups]
    if saved != mine:
        raise CheckpointError(
            f"{path}: the optimizer had groups of {saved} parameters, this one has {mine}; make it the same way"
        )


@torch.no_grad()
def _put_values(
    adapted: AdaptedModel, values: Mapping[str, torch.Tensor], gradients: Mapping[str, torch.Tensor]
) -> None:
    for name, target in find_saved_tensors(adapted).items():
        target.copy_(values[name])
        if isinstance(target, torch.nn.Parameter):
            target.grad = gradients[name].to(target.device) if name in gradients else None


def _put_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load the state; torch casts it to the parameters' dtypes, which would round wider moments, so it is put back."""
    optimizer.load_state_dict(state)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    indices = [index for group in state["param_groups"] for index in group["params"]]
    for parameter, index in zip(parameters, indices, strict=True):
        for key, value in state["state"].get(index, {}).items():
            loaded = optimizer.state[parameter][key]
            if isinstance(value, torch.Tensor) and loaded.dtype != value.dtype:
                optimizer.state[parameter][key] = value.to(loaded.device)
