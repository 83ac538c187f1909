"""Keep less memory for backward while a model's own Python runs.

An adapted layer does not keep an input that a cheap operator can recompute from what autograd saves for that operator
anyway. ``nn.Dropout`` keeps its mask as bytes. The GELU that transformers defines for GPT-2 keeps only its input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from passes.compat import (
    has_saved_tensor_hooks,
    is_changed_by_user_mode,
    is_saved_plainly,
    is_transformed,
    read_saved,
    version_of,
)
from passes.fuse.fused_ops import Recomputation
from passes.fuse.memory_efficient_ops import memory_efficient_dropout, recompute_layer_norm, tanh_gelu

aten = torch.ops.aten

#: Torch's own functions at import time; somebody may patch them later.
_DROPOUT_FORWARD, _DROPOUT = nn.Dropout.forward, F.dropout

#: The least number of elements of an activation that is recomputed.
_LARGE = 1 << 15


def find_recomputation(x: torch.Tensor) -> Recomputation | None:
    """How backward can recompute x, if x is a large output of GELU, SiLU or layer normalization; else ``None``."""
    if x.numel() < _LARGE or is_transformed() or is_kept_elsewhere():
        return None
    node = x.grad_fn
    if node is None or version_of(x):  # the output of an operator has version 0 until something writes into it
        return None
    shape = None
    if node.name() in ("ViewBackward0", "UnsafeViewBackward0") and node.next_functions[0][0] is not None:
        node, shape = node.next_functions[0][0], tuple(x.shape)
    find = _RECOMPUTATIONS.get(node.name())
    found = None if find is None else find(node)
    return None if found is None else (*found, shape)


def is_kept_elsewhere() -> bool:
    """Whether hooks store what autograd saves, as in an activation checkpoint or with activations moved to the host."""
    return has_saved_tensor_hooks()


Partial = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


def _recompute_gelu(node: Any) -> Partial | None:
    if not is_saved_plainly(node, "self"):
        return None
    x, approximate = read_saved(node, "self", "approximate")
    return aten.gelu.default, (x,), {"approximate": approximate}


def _recompute_silu(node: Any) -> Partial | None:
    return (aten.silu.default, read_saved(node, "self"), {}) if is_saved_plainly(node, "self") else None


def _recompute_layer_norm(node: Any) -> Partial | None:
    if not is_saved_plainly(node, "input", "result1", "result2", "weight", "bias"):
        return None
    *saved, weight, bias = read_saved(node, "input", "result1", "result2", "weight", "bias")
    affine = [None if one is None else one.detach().clone() for one in (weight, bias)]
    (shape,) = read_saved(node, "normalized_shape")
    return recompute_layer_norm.__name__, (*saved, *affine, len(shape)), {}


#: Defined as 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
_TANH_GELU = "transformers.activations.NewGELUActivation"

_RECOMPUTATIONS: Mapping[str, Callable[[Any], Partial | None]] = {
    "GeluBackward0": _recompute_gelu,
    "SiluBackward0": _recompute_silu,
    "NativeLayerNormBackward0": _recompute_layer_norm,
}


def drop(module: nn.Dropout, input: torch.Tensor) -> torch.Tensor:
    """``nn.Dropout.forward``, which in training keeps the mask as bytes."""
    cls: Any = type(module)
    users_forward: Callable[..., torch.Tensor] = cls.users_class.forward
    if users_forward is not _DROPOUT_FORWARD or F.dropout is not _DROPOUT:
        return users_forward(module, input)
    p: object = module.p  # users assign tensors and integers too
    is_plain = module.training and not module.inplace and isinstance(p, float) and 0 < p < 1
    if not is_plain or is_transformed() or is_kept_elsewhere() or is_changed_by_user_mode():
        return F.dropout(input, module.p, module.training, module.inplace)
    return memory_efficient_dropout(input, module.p, True)


def apply_tanh_gelu(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """The GELU that transformers defines for GPT-2."""
    if is_transformed() or is_kept_elsewhere() or is_changed_by_user_mode() or not torch.is_grad_enabled():
        cls: Any = type(module)
        forward: Callable[..., torch.Tensor] = cls.users_class.forward
        return forward(module, input)
    return tanh_gelu(input, math.sqrt(2 / math.pi), 0.044715)


def find_memory_efficient_forward(cls: type[nn.Module]) -> Callable[..., torch.Tensor] | None:
    """A ``forward`` for modules of a known class that computes the same and keeps less memory, or ``None``."""
    if issubclass(cls, torch.jit.ScriptModule):
        return None
    if cls.forward is _DROPOUT_FORWARD:
        return drop
    found: Any = cls
    if f"{cls.__module__}.{cls.__qualname__}" == _TANH_GELU and _is_tanh_gelu(found):
        return apply_tanh_gelu
    return None


@functools.cache
def _is_tanh_gelu(cls: Any) -> bool:
    """Whether the installed class computes the same as :func:`~passes.fuse.memory_efficient_ops.tanh_gelu`."""
    x = torch.linspace(-6.0, 6.0, 97)
    with torch.no_grad():
        found: torch.Tensor = cls.forward(cls(), x)
        return torch.equal(found, tanh_gelu(x, math.sqrt(2 / math.pi), 0.044715))
