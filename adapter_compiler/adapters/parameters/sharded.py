"""Operations on sharded parameters (DTensor) that plain ones do not need, and errors where whole ones are needed."""

from __future__ import annotations

import torch
from torch import nn

from adapter_compiler.errors import ConfigError


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, such as a parameter under FSDP2."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "full_tensor")


def gather_full(tensor: torch.Tensor) -> torch.Tensor:
    """The whole tensor on every process; a reduction over a sharded dimension is partial until it is gathered."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def replicate_like(tensor: torch.Tensor, sharded: torch.Tensor) -> torch.Tensor:
    """A tensor that is the same on every process, in a type that operators accept together with ``sharded``."""
    if not is_sharded(sharded):
        return tensor
    from torch.distributed.tensor import DTensor, Replicate

    mesh = sharded.device_mesh  # type: ignore[attr-defined]
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)


def assert_whole(module: nn.Module, what: str, advice: str) -> None:
    """Raise :class:`ConfigError` if a parameter of a module is a DTensor.

    Args:
        module: the module.
        what: what needs whole parameters, for the message.
        advice: what to do, for the message.
    """
    for name, parameter in module.named_parameters():
        if is_sharded(parameter):
            ranks = parameter.device_mesh.size()  # type: ignore[attr-defined]
            raise ConfigError(
                f"{what}: {name} is a DTensor over {ranks} ranks, expected a parameter that is whole here; {advice}"
            )
