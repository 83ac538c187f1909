"""Load a training state on any number of ranks, or in one process."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.device_mesh import DeviceMesh

from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.errors import CheckpointError
from adapter_compiler.integrations.fsdp.agreement import (
    Group,
    find_rank,
    find_size,
    run_on_every_rank,
    share_from_first,
)
from adapter_compiler.integrations.fsdp.state.base_checksums import describe_sharded_base
from adapter_compiler.integrations.fsdp.state.layout import (
    FORMAT,
    HEADER_FILE,
    allocate,
    drop_empty,
    find_mesh,
    name_of_rank,
)
from adapter_compiler.integrations.fsdp.state.reader import TensorReader
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.adapters import assert_is_adapted
from adapter_compiler.saving.primitives.file_format import read_file
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.random_state import make_random_state
from adapter_compiler.training.resuming.all_or_nothing import all_or_nothing
from adapter_compiler.training.resuming.state_file import SavedState, Stateful, assert_fits_model, check_state
from adapter_compiler.training.training_state import put_state

_GRADIENTS, _RANDOM = "gradients", "random.torch"


def load_sharded_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None = None,
    **others: Stateful,
) -> None:
    """Resume from a folder of :meth:`ShardedAdapters.save_training_state`.

    The model may be sharded over any number of ranks, each of which must call this, or whole in one process. On the
    number of ranks that saved, the run goes on bit for bit. On another one, gradients that were accumulated are
    averaged, each rank takes what the saved rank of its number had for itself, and further ranks take that of rank 0,
    with random generators that are seeded anew from the saved ones.

    The header is checked before anything changes. If one rank cannot load its part, all restore what they had. The
    files are data: the pickle in which ``torch.distributed.checkpoint`` keeps its metadata runs no code.

    Args:
        directory: the folder.
        adapted: the model, compiled as in the saved run.
        optimizer: its optimizer, made as in the saved run.
        budget: its rank budget, if the saved run had one.
        others: the other objects, by the same names.

    Raises:
        CheckpointError: the folder is missing or damaged, or belongs to other weights, sites, options or objects.
        DistributedError: another rank failed.
    """
    assert_is_adapted(adapted, "load_sharded_state")
    mesh = find_mesh(adapted)
    group = None if mesh is None else mesh.get_group()
    path = Path(directory) / HEADER_FILE
    header = share_from_first(group, lambda: read_file(path, FORMAT)[0])
    base = describe_sharded_base(adapted, group)
    run_on_every_rank(group, lambda: assert_fits_model(path, header, adapted, base))
    state, tensors = _read(path, header, mesh, group)
    rank = find_rank(group)
    is_new = rank >= len(header["ranks"])
    seed = int(compute_checksum(tensors[_RANDOM])[:12], 16) + rank if is_new else 0

    def check() -> SavedState:
        whole = {**header, "state": state}
        saved = check_state(path, whole, tensors, adapted, optimizer, budget, others)
        return _reseed(saved, seed) if is_new else saved

    saved = run_on_every_rank(group, check)
    with all_or_nothing(path, adapted, optimizer, budget, others):
        run_on_every_rank(group, lambda: put_state(path, saved, adapted, optimizer, budget, others))


def _read(
    path: Path, header: Mapping[str, Any], mesh: DeviceMesh | None, group: Group
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The nested states for this rank, and their tensors."""
    ranks, rank = header["ranks"], find_rank(group)
    own = rank if rank < len(ranks) else 0
    is_other_number = len(ranks) != find_size(group)
    # Accumulated gradients of other ranks are needed where these are not there to add theirs.
    parts = {number: part["layout"] for number, part in enumerate(ranks) if number == own or is_other_number}
    shared = allocate(header["layout"], mesh)
    by_rank = {
        number: allocate({n: k for n, k in layout.items() if number == own or n.startswith(f"{_GRADIENTS}.")}, None)
        for number, layout in parts.items()
    }
    named = {name_of_rank(number, name): t for number, found in by_rank.items() for name, t in found.items()}
    _read_tensors(path.parent / header["data"], shared | named, group)
    tensors = shared | by_rank[own]
    state = {**header["state"], **ranks[own]["state"]}
    if is_other_number:
        state[_GRADIENTS] = {k: v for part in ranks for k, v in part["state"][_GRADIENTS].items()}
        tensors |= _average_gradients(list(by_rank.values()))
    return state, tensors


def _average_gradients(by_rank: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The mean over the saved ranks of each gradient; a rank without one counts as zero."""
    names = {name for found in by_rank for name in found if name.startswith(f"{_GRADIENTS}.")}
    return {
        name: torch.stack([found[name] for found in by_rank if name in found]).sum(0) / len(by_rank)
        for name in sorted(names)
    }


def _read_tensors(data: Path, tensors: dict[str, torch.Tensor], group: Group) -> None:
    def assert_there() -> None:
        if not data.is_dir():
            raise CheckpointError(f"{data} does not exist, expected the tensors of the state; every rank must see it")

    def read() -> None:
        try:
            with warnings.catch_warnings():
                # It warns of one process even if it is told that there is no group.
                warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
                reader = TensorReader(data)
                load(drop_empty(tensors), storage_reader=reader, process_group=group, no_dist=group is None)
        except CheckpointException as error:  # which is no Exception
            failures = ", ".join(f"rank {rank}: {one[0]}" for rank, one in sorted(error.failures.items()))
            raise CheckpointError(
                f"{data}: not all ranks could read ({failures}), expected what the header names; nothing was changed"
            ) from error

    run_on_every_rank(group, assert_there)
    run_on_every_rank(group, read)


def _reseed(saved: SavedState, seed: int) -> SavedState:
    return dataclasses.replace(saved, state={**saved.state, "random": make_random_state(seed)})
