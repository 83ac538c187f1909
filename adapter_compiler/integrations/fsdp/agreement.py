"""Let all ranks fail if one does, so that none waits for a rank that has gone another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from adapter_compiler import errors
from adapter_compiler.errors import DistributedError

T = TypeVar("T")

#: A process group; ``None`` without one, in a process that is alone.
Group = Any


def run_on_every_rank(group: Group, act: Callable[[], T]) -> T:
    """What ``act`` returns on this rank, when it has returned on every rank.

    Raises:
        Exception: the error of this rank, or on a rank without one, that of the first rank that has one: in its class
            if it is one of ours, else a :class:`DistributedError`.
    """
    failure, result = None, None
    try:
        result = act()
    except Exception as error:
        failure = error
    if group is not None:
        found = _gather(group, None if failure is None else (type(failure).__name__, str(failure)))
        failed = [(rank, one) for rank, one in enumerate(found) if one is not None]
        if failed and failure is None:
            raise _make_error(*failed[0])
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]


def run_on_first_rank(group: Group, act: Callable[[], T]) -> T | None:
    """What ``act`` returns on rank 0, and ``None`` on the others, which wait for it.

    Raises:
        Exception: as :func:`run_on_every_rank`.
    """
    return run_on_every_rank(group, act if is_first(group) else lambda: None)


def share_from_first(group: Group, act: Callable[[], T]) -> T:
    """What ``act`` returns on rank 0, on every rank.

    Raises:
        Exception: as :func:`run_on_every_rank`.
    """
    result = [run_on_first_rank(group, act)]
    if group is not None:
        dist.broadcast_object_list(result, group=group, group_src=0)
    return result[0]  # type: ignore[return-value]


def gather_on_all(group: Group, value: T) -> list[T]:
    """The values of all ranks, in their order."""
    return [value] if group is None else _gather(group, value)


def sum_integers(group: Group, values: list[int], device: torch.device) -> list[int]:
    """Σ over the ranks of each integer modulo 2⁶⁴."""
    if group is None:
        return [value % (1 << 64) for value in values]
    signed = [(value + (1 << 63)) % (1 << 64) - (1 << 63) for value in values]
    total = torch.tensor(signed, dtype=torch.int64, device=device)
    dist.all_reduce(total, group=group)
    return [value % (1 << 64) for value in total.tolist()]


def find_rank(group: Group) -> int:
    """The rank of this process in the group."""
    return 0 if group is None else dist.get_rank(group)


def find_size(group: Group) -> int:
    """The number of ranks."""
    return 1 if group is None else dist.get_world_size(group)


def is_first(group: Group) -> bool:
    """Whether this is rank 0 of the group."""
    return find_rank(group) == 0


def _gather(group: Group, value: T) -> list[T]:
    found: list[Any] = [None] * find_size(group)
    dist.all_gather_object(found, value, group=group)
    return found


def _make_error(rank: int, failure: tuple[str, str]) -> Exception:
    name, text = failure
    kind = getattr(errors, name, None) if name in errors.__all__ else None
    if kind is None:
        return DistributedError(f"rank {rank} failed ({name}: {text}), expected success on every rank; see its output")
    made: Exception = kind(f"rank {rank}: {text}")
    return made
