"""Check that a run resumes with the same frozen weights, because adapters only fit the weights of their training.

The file has the dtype, the shape and a checksum over all bytes of each frozen parameter. Each save and each load reads
the base once, at the speed of memory: about a second for a gigabyte on one CPU core, a few milliseconds on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from adapter_compiler.adapters.named_adapters import find_module_tensors
from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.adapters.parameters.sharded import is_sharded
from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel


def describe_base(adapted: AdaptedModel) -> dict[str, str]:
    """The dtype, shape and checksum of each frozen parameter, by name.

    Parameters on the meta device, sharded ones (DTensor) and tensor subclasses without memory of their own are left
    out.
    """
    return {name: describe_tensor(p) for name, p in find_frozen(adapted).items() if _has_bytes(p)}


def find_frozen(adapted: AdaptedModel) -> dict[str, torch.nn.Parameter]:
    """The frozen parameters by name."""
    trained = find_module_tensors(adapted)
    return {name: p for name, p in adapted.module.named_parameters() if name not in trained}


def assert_same_base(path: Path, saved: Mapping[str, str], mine: Mapping[str, str]) -> None:
    """Raise :class:`CheckpointError` if frozen weights differ from those of the saved run.

    Args:
        path: the file, for messages.
        saved: what :func:`describe_base` gave in the saved run.
        mine: what it gives now.
    """
    odd = [name for name in mine if name in saved and mine[name] != saved[name]]
    if odd:
        raise CheckpointError(
            f"{path}: {len(odd)} of {len(mine)} frozen weights of this model are not those of the run that was saved, "
            f"for example {odd[0]} is {mine[odd[0]]}, expected {saved[odd[0]]} (dtype, shape and checksum); load the "
            "same base weights before compiling"
        )


def _has_bytes(tensor: torch.Tensor) -> bool:
    is_wrapper = hasattr(tensor, "__tensor_flatten__") or is_sharded(tensor)
    return not tensor.is_meta and not is_wrapper and tensor.layout == torch.strided


def describe_tensor(tensor: torch.Tensor) -> str:
    """The dtype, shape and checksum of a tensor."""
    plain = tensor.detach().as_subclass(torch.Tensor)
    return f"{plain.dtype} {list(plain.shape)} {compute_checksum(plain)}".removeprefix("torch.")
