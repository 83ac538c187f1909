"""``forward`` of known layers, with the adapters on activations and without a read of the weight.

    nn.Linear                                    always, because it is called so often
    nn.Embedding, nn.Conv1d, nn.Conv2d,          in compiled code, where a read gives W + ΔW as values: a matrix of W's
    nn.Conv3d, transformers' Conv1D              size, whose gradient is as expensive as that of training W

If somebody has patched the ``forward`` of the class, or torch's function that it calls, the patch runs instead.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from adapter_compiler.model.dispatch.memory import find_recomputation
from adapter_compiler.model.dispatch.slots import SLOTS, Slot, assert_gathered
from adapter_compiler.model.dispatch.weights.products import make_convolution, multiply, run_embedding
from passes.adapt.apply_adapters import BoundAdapter
from passes.compat import is_changed_by_user_mode
from passes.quantize.packed_weights import is_packed

#: Torch's own functions at import time; somebody may patch them later.
_LINEAR_FORWARD, _LINEAR = nn.Linear.forward, F.linear
_EMBEDDING_FORWARD, _EMBEDDING = nn.Embedding.forward, F.embedding
_ADDMM = torch.addmm

Forward = Callable[..., torch.Tensor]


@dataclasses.dataclass(frozen=True)
class BoundWeight:
    """A weight and its adapters, for the handlers of :mod:`adapter_compiler.model.dispatch.weights.products`."""

    base: torch.Tensor
    adapters: tuple[BoundAdapter, ...]
    slot: Slot
    is_transposed: bool = False

    def dim(self) -> int:
        """The number of dimensions of W."""
        return self.base.dim()

    def __len__(self) -> int:
        return len(self.base)


def find_layer_forward(cls: type[nn.Module]) -> Forward | None:
    """A ``forward`` for modules of a known class with an adapted ``weight``, or ``None``."""
    if cls.forward is _LINEAR_FORWARD:
        return call_linear
    if cls.forward is _EMBEDDING_FORWARD:
        return call_embedding
    found: Any = cls
    for base, run in _CONVOLUTIONS.items():
        if cls.forward is base.forward and found._conv_forward is base._conv_forward:
            return run
    if f"{cls.__module__}.{cls.__qualname__}" == _CONV1D and _is_transposed_linear(found):
        return _make_transposed_forward(cls.forward)
    return None


def call_linear(module: nn.Linear, input: torch.Tensor) -> torch.Tensor:
    """``nn.Linear.forward``."""
    users_forward = _find_users_forward(module)
    if users_forward is not _LINEAR_FORWARD:
        return users_forward(module, input)
    weight = module._parameters.get("weight")
    slot: Slot | None = module.__dict__.get(SLOTS, {}).get("weight")
    adapters = None if slot is None or weight is None else slot.bind(module, "weight", weight)
    is_plain = _is_plain(input) and F.linear is _LINEAR and not input.is_nested and not is_changed_by_user_mode()
    if (
        not is_plain and slot is not None and slot.is_routed
    ):  # there is no other way, so modes see the adapter's operators
        is_plain = F.linear is _LINEAR
    if adapters is None or slot is None or weight is None or not is_plain or slot.hooks.belong_to(weight):
        return F.linear(input, module.weight, module.bias)
    assert_gathered(weight, slot.weight)
    recomputation = find_recomputation(input) if slot.recompute else None
    found = multiply(
        input, weight, module.bias, adapters, stored_in_out=False, fused=slot.fused, recomputation=recomputation
    )
    return F.linear(input, module.weight, module.bias) if found is NotImplemented else found


def call_embedding(module: nn.Embedding, input: torch.Tensor) -> torch.Tensor:
    """``nn.Embedding.forward``."""
    users_forward = _find_users_forward(module)
    bound = _bind_compiled(module) if users_forward is _EMBEDDING_FORWARD and F.embedding is _EMBEDDING else None
    found: Any = NotImplemented
    if bound is not None and _is_plain(input):
        found = run_embedding(
            input, bound, module.padding_idx, module.max_norm, module.norm_type, module.scale_grad_by_freq
        )
    return users_forward(module, input) if found is NotImplemented else found


def _make_transposed_forward(original: Forward) -> Forward:
    def call(module: Any, x: torch.Tensor) -> torch.Tensor:
        """``forward`` of transformers' ``Conv1D``, a linear layer whose weight is [in, out]."""
        users_forward = _find_users_forward(module)
        bound = _bind_compiled(module) if users_forward is original and torch.addmm is _ADDMM else None
        found: Any = NotImplemented
        if bound is not None and (_is_plain(x) or bound.slot.is_routed):
            matrix, fused = bound.base.t(), bound.slot.fused
            found = multiply(x, matrix, module.bias, bound.adapters, stored_in_out=True, fused=fused)
        return users_forward(module, x) if found is NotImplemented else found

    return call


def _make_convolution_forward(base: Any, target: Forward, spatial: int) -> Forward:
    original, convolve = base.forward, make_convolution(target, spatial)

    def call(module: Any, input: torch.Tensor) -> torch.Tensor:
        """``forward`` of a convolution; other modes of padding than zeros run on the values."""
        users_forward = _find_users_forward(module)
        is_known = users_forward is original and getattr(F, f"conv{spatial}d") is target
        bound = _bind_compiled(module) if is_known and module.padding_mode == "zeros" else None
        found: Any = NotImplemented
        if bound is not None and _is_plain(input):
            options = (module.stride, module.padding, module.dilation, module.groups)
            found = convolve(input, bound, module.bias, *options)
        return users_forward(module, input) if found is NotImplemented else found

    return call


_CONVOLUTIONS: Mapping[Any, Forward] = {
    nn.Conv1d: _make_convolution_forward(nn.Conv1d, F.conv1d, 1),
    nn.Conv2d: _make_convolution_forward(nn.Conv2d, F.conv2d, 2),
    nn.Conv3d: _make_convolution_forward(nn.Conv3d, F.conv3d, 3),
}

#: Computes x W + b by ``torch.addmm`` for x of any number of dimensions.
_CONV1D = "transformers.pytorch_utils.Conv1D"


def is_flattening(cls: type[nn.Module]) -> bool:
    """Whether ``forward`` joins all leading dimensions of its input before the product, as ``Conv1D`` does."""
    return f"{cls.__module__}.{cls.__qualname__}" == _CONV1D


@functools.cache
def _is_transposed_linear(cls: Any) -> bool:
    """Whether the installed class of transformers computes x W + b."""
    probe = nn.Module()
    probe.nf, probe.weight, probe.bias = 3, torch.linspace(-1, 1, 6).view(2, 3), torch.tensor([1.0, 2.0, 4.0])  # type: ignore[assignment]
    x = torch.linspace(-3, 2, 16).view(2, 4, 2)
    with torch.no_grad():
        return torch.equal(cls.forward(probe, x), torch.addmm(probe.bias, x.view(-1, 2), probe.weight).view(2, 4, 3))


def _is_plain(x: Any) -> bool:
    """Whether x is a tensor of no subclass."""
    return type(x) in (torch.Tensor, nn.Parameter)


def _find_users_forward(module: Any) -> Forward:
    forward: Forward = type(module).users_class.forward
    return forward


def _bind_compiled(module: nn.Module) -> BoundWeight | None:
    """The weight with its adapters in compiled code, if ΔW is to be added and the weight is not quantized.

    An update that depends on the call has no ΔW that a read could give to an exporter's trace.
    """
    slot: Slot | None = module.__dict__.get(SLOTS, {}).get("weight")
    is_wanted = torch.compiler.is_compiling() or (slot is not None and slot.is_routed)
    weight = module._parameters.get("weight") if is_wanted else None
    if weight is None or slot is None or is_packed(weight) or slot.hooks.belong_to(weight):
        return None
    adapters = slot.bind(module, "weight", weight)
    if adapters is None:
        return None
    assert_gathered(weight, slot.weight)
    return BoundWeight(weight, adapters, slot)
