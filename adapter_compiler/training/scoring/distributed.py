"""The two places where a sharded parameter (DTensor) needs other words than a plain one."""

from __future__ import annotations

import torch


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, as FSDP2 makes of parameters."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every rank: a mean over a sharded dimension is only a part until it is gathered."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def replicate_like(tensor: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """``tensor``, the same on every rank, as an operand next to ``sharded``."""
    if not is_sharded(sharded):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
