"""Save a training state, of which each rank writes a part."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from adapter_compiler.errors import CheckpointError
from adapter_compiler.integrations.fsdp.agreement import (
    Group,
    find_rank,
    gather_on_all,
    is_first,
    run_on_every_rank,
    run_on_first_rank,
    share_from_first,
)
from adapter_compiler.integrations.fsdp.state.base_checksums import describe_sharded_base
from adapter_compiler.integrations.fsdp.state.layout import (
    DATA,
    FORMAT,
    HEADER_FILE,
    OWN,
    SHARED,
    describe_layout,
    drop_empty,
    name_of_rank,
    split_by_owner,
)
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.training.budget import RankBudget
from adapter_compiler.training.resuming.state_file import Stateful
from adapter_compiler.training.training_state import collect_state
from passes.compat import has_unreduced_gradients


def save_sharded_state(
    directory: str | Path,
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    budget: RankBudget | None,
    group: Group,
    others: Mapping[str, Stateful],
) -> Path:
    """Write a training state into a folder that every rank sees; an earlier one stays whole until this one is.

    Saved once: adapters, fully trained parameters and their gradients, the optimizer, the budget. Saved for each rank:
    accumulated gradients of adapters, buffers, random generators, and the other objects.

    Args:
        directory: the folder; it is created if it does not exist.
        adapted: the model in training.
        optimizer: its optimizer.
        budget: its rank budget, if it has one.
        group: the ranks; every one must call this.
        others: other objects with a state, by name.

    Returns:
        The path of the header.

    Raises:
        CheckpointError: a state has a value that is neither plain data nor a tensor, or fully trained parameters have
            gradients that are not reduced yet.
        DistributedError: another rank failed.
        OSError: the folder cannot be written.
    """
    path = Path(directory) / HEADER_FILE
    run_on_every_rank(group, lambda: _assert_reduced(path, adapted))
    base = describe_sharded_base(adapted, group)
    header, tensors = run_on_every_rank(group, lambda: collect_state(adapted, optimizer, budget, others, base))
    shared, own = split_by_owner(tensors, adapted)
    state = header.pop("state")
    mine = {"state": {part: state[part] for part in OWN}, "layout": describe_layout(own)}
    header |= {"state": {part: state[part] for part in SHARED}, "layout": describe_layout(shared)}
    header |= {"ranks": gather_on_all(group, mine)}
    named = {name_of_rank(find_rank(group), name): tensor for name, tensor in own.items()}
    with _new_data(path.parent, group) as data:
        _write_tensors(data, drop_empty(shared | named), group)
        run_on_first_rank(group, lambda: _write_header(path, {**header, "data": data.name}))
    run_on_first_rank(group, lambda: _remove_data(path.parent, apart_from=data.name))
    return path


def _assert_reduced(path: Path, adapted: AdaptedModel) -> None:
    if has_unreduced_gradients(adapted.module):
        raise CheckpointError(
            f"{path}: gradients of fully trained parameters are accumulated and not reduced over the ranks yet "
            "(set_requires_gradient_sync(False)), expected none; save after the optimizer step"
        )


@contextlib.contextmanager
def _new_data(directory: Path, group: Group) -> Iterator[Path]:
    """A new folder for tensors, which is removed if the block raises, as it then does on every rank."""

    def make() -> str:
        made = directory / f"{DATA}{secrets.token_hex(8)}"
        made.mkdir(parents=True)
        return made.name

    data = directory / share_from_first(group, make)
    try:
        yield data
    except BaseException:
        if is_first(group):
            shutil.rmtree(data, ignore_errors=True)
        raise


def _write_tensors(data: Path, tensors: dict[str, Any], group: Group) -> None:
    """Write the tensors of all ranks, those that several have once."""

    def write() -> None:
        try:
            save(
                tensors,
                storage_writer=FileSystemWriter(data),
                process_group=group,
                no_dist=group is None,
            )
        except CheckpointException as error:  # which is no Exception
            failures = ", ".join(f"rank {rank}: {one[0]}" for rank, one in sorted(error.failures.items()))
            raise CheckpointError(f"{data}: not all ranks could write ({failures}); nothing was saved") from error

    run_on_every_rank(group, write)


def _write_header(path: Path, header: Mapping[str, Any]) -> None:
    with written_beside(path) as draft:
        save_file({}, draft, metadata=FORMAT.make_metadata(header, {}))


def _remove_data(directory: Path, *, apart_from: str) -> None:
    """Remove the tensors of earlier states."""
    for found in directory.glob(f"{DATA}*"):
        if found.name != apart_from:
            shutil.rmtree(found, ignore_errors=True)
