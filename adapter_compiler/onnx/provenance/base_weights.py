"""A cryptographic hash of the weights that adapters were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import nn

from adapter_compiler.adapters.parameters.sharded import is_sharded
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.resuming.base_weights import find_frozen

#: Values that are hashed at once, so that a weight on a GPU is not copied as a whole.
_AT_ONCE = 1 << 24


def hash_base_weights(model: nn.Module) -> str | None:
    """SHA-256 over the weights of a model without its adapters; ``None`` if some have no bytes in this process.

    It is taken over name, dtype, shape and bytes of each parameter, ordered by name. Of an adapted model these are the
    frozen parameters; what was trained fully is no longer that of the base.
    """
    found = find_frozen(model) if isinstance(model, AdaptedModel) else dict(model.named_parameters())
    return hash_tensors(found)


def hash_tensors(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """SHA-256 over tensors by name; ``None`` if one of them has no plain bytes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        is_wrapper = hasattr(tensor, "__tensor_flatten__") or is_sharded(tensor)
        if tensor.is_meta or is_wrapper or tensor.layout != torch.strided:
            return None
        plain = tensor.as_subclass(torch.Tensor)
        dtype = str(plain.dtype).removeprefix("torch.")
        digest.update(f"{name!r} {dtype} {list(plain.shape)}\n".encode())
        for part in plain.reshape(-1).split(_AT_ONCE) if plain.numel() else ():
            digest.update(part.cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
