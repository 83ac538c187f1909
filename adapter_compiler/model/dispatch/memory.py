"""Let activations keep less for backward while a model's own Python runs.

An adapted layer does not keep an input that a cheap operator gives once more from what autograd keeps for that operator
anyway. ``nn.Dropout`` keeps bytes for its mask; the GELU that transformers writes out for GPT-2 keeps only its input.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from passes.adapt.apply_adapters import is_transformed
from passes.fuse.fused_ops import Recomputation
from passes.fuse.memory_efficient_ops import memory_efficient_dropout, recompute_layer_norm, written_gelu

aten = torch.ops.aten

#: Torch's own code, as it was when this was imported: it may be patched later.
_DROPOUT_FORWARD, _DROPOUT = nn.Dropout.forward, F.dropout

#: Elements from which an activation is worth it.
_LARGE = 1 << 15


def find_recomputation(x: torch.Tensor) -> Recomputation | None:
    """How x is computed once more in backward, if it is the large output of GELU, SiLU or layer normalization."""
    if x.numel() < _LARGE or is_transformed() or is_kept_elsewhere():
        return None
    node = x.grad_fn
    if node is None or x._version:  # written into since: an operator's fresh output has version 0
        return None
    shape = None
    if node.name() in ("ViewBackward0", "UnsafeViewBackward0") and node.next_functions[0][0] is not None:
        node, shape = node.next_functions[0][0], tuple(x.shape)
    find = _RECOMPUTATIONS.get(node.name())
    found = None if find is None else find(node)
    return None if found is None else (*found, shape)


def is_kept_elsewhere() -> bool:
    """Whether hooks decide what is kept, as in an activation checkpoint or where activations are moved to the host."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _is_plain(*saved: Any) -> bool:
    """Whether what a node has saved is kept as it is, so that reading it costs and changes nothing."""
    return all(one is None or one.unpack_hook is None for one in saved)


Partial = tuple[Any, tuple[Any, ...], Mapping[str, Any]]


def _recompute_gelu(node: Any) -> Partial | None:
    if not _is_plain(node._raw_saved_self):
        return None
    return aten.gelu.default, (node._saved_self,), {"approximate": node._saved_approximate}


def _recompute_silu(node: Any) -> Partial | None:
    return (aten.silu.default, (node._saved_self,), {}) if _is_plain(node._raw_saved_self) else None


def _recompute_layer_norm(node: Any) -> Partial | None:
    raw = (node._raw_saved_input, node._raw_saved_result1, node._raw_saved_result2, node._raw_saved_weight)
    if not _is_plain(*raw, node._raw_saved_bias):
        return None
    affine = [None if one is None else one.detach().clone() for one in (node._saved_weight, node._saved_bias)]
    saved = (node._saved_input, node._saved_result1, node._saved_result2, *affine)
    return recompute_layer_norm.__name__, (*saved, len(node._saved_normalized_shape)), {}


#: Written out as 0.5 x (1 + tanh(√(2/π) (x + 0.044715 x³))).
_WRITTEN_GELU = "transformers.activations.NewGELUActivation"

_RECOMPUTATIONS: Mapping[str, Callable[[Any], Partial | None]] = {
    "GeluBackward0": _recompute_gelu,
    "SiluBackward0": _recompute_silu,
    "NativeLayerNormBackward0": _recompute_layer_norm,
}


def drop(module: nn.Dropout, input: torch.Tensor) -> torch.Tensor:
    """``nn.Dropout.forward``, with bytes for the mask in training."""
    users_forward: Callable[..., torch.Tensor] = module.users_class.forward  # type: ignore[union-attr]
    if users_forward is not _DROPOUT_FORWARD or F.dropout is not _DROPOUT:
        return users_forward(module, input)
    if not module.training or module.inplace or not 0 < module.p < 1 or is_transformed() or is_kept_elsewhere():
        return F.dropout(input, module.p, module.training, module.inplace)
    return memory_efficient_dropout(input, module.p, True)


def apply_written_gelu(module: nn.Module, input: torch.Tensor) -> torch.Tensor:
    """The GELU of GPT-2, which transformers writes out."""
    if is_transformed() or is_kept_elsewhere() or not torch.is_grad_enabled():
        forward: Callable[..., torch.Tensor] = module.users_class.forward  # type: ignore[union-attr]
        return forward(module, input)
    return written_gelu(input, math.sqrt(2 / math.pi), 0.044715)


def find_frugal_forward(cls: type[nn.Module]) -> Callable[..., torch.Tensor] | None:
    """A ``forward`` for modules of a known class that computes the same and keeps less, if there is one."""
    if issubclass(cls, torch.jit.ScriptModule):
        return None
    if cls.forward is _DROPOUT_FORWARD:
        return drop
    found: Any = cls
    if f"{cls.__module__}.{cls.__qualname__}" == _WRITTEN_GELU and _is_written_gelu(found):
        return apply_written_gelu
    return None


@functools.cache
def _is_written_gelu(cls: Any) -> bool:
    """Whether the class still computes what :func:`~passes.fuse.memory_efficient_ops.written_gelu` does."""
    x = torch.linspace(-6.0, 6.0, 97)
    with torch.no_grad():
        found: torch.Tensor = cls.forward(cls(), x)
        return torch.equal(found, written_gelu(x, math.sqrt(2 / math.pi), 0.044715))
