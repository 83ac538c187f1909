"""The tensor that a read of an adapted weight gives, and what each Python operator does with it.

An operator that gets the tensor reaches ``__torch_function__``. A table says what runs in its place:

    products, lookups, convolutions, attention    run on activations, without W + ΔW (``products``, ``attention``)
    shape, dtype, device, …                       are read from the tensor itself
    grad, data, requires_grad, hooks              act on the parameter that the tensor represents
    everything else                               runs on the values of W + ΔW (``writes``)
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from adapter_compiler.model.dispatch.slots import assert_gathered
from adapter_compiler.model.dispatch.weights.attention import run_attention
from adapter_compiler.model.dispatch.weights.products import (
    make_convolution,
    run_addmm,
    run_bmm,
    run_embedding,
    run_linear,
    run_matmul,
    run_reflected_matmul,
)
from adapter_compiler.model.dispatch.weights.weight_sum import BoundAdapters, WeightSum
from adapter_compiler.model.dispatch.weights.writes import SET_DATA, run_on_values, write_data
from passes.adapt.apply_adapters import BoundAdapter, adapted_sum
from passes.compat import WithoutTorchFunction
from passes.fuse.differentiate import differentiate


class AdaptedWeight(WeightSum):
    """W + ΔW as a read gives it; see the module's docstring. Each read makes one with :func:`make_adapted_weight`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the handler of an operator if it has one that accepts the arguments, else run it on the values."""
        kwargs = kwargs or {}
        if func in _PROPERTIES or (_has_watched(args) and func not in _HANDLED_WHEN_WATCHED):
            with WithoutTorchFunction():
                return func(*args, **kwargs)
        if (handler := _HANDLERS.get(func)) is not None and kwargs.keys() <= _KEYWORDS[func]:
            if func in _PRODUCTS:
                _assert_gathered(*args, *kwargs.values())
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return run_on_values(func, args, kwargs)


def make_adapted_weight(base: torch.Tensor, adapters: BoundAdapters, *, fused: bool, site: str) -> AdaptedWeight:
    """W + ΔW as a read gives it.

    Args:
        base: W.
        adapters: the adapters of the weight.
        fused: whether functions with their own backward may be used.
        site: the weight's qualified name, for messages.
    """
    if torch.is_grad_enabled():
        parameters = [p for adapter in adapters for p in adapter.parameters.values()]
        made: AdaptedWeight = _WholeWeight.apply(adapters, fused, site, base, *parameters)  # type: ignore[no-untyped-call]
        return made
    return AdaptedWeight(base, adapters, registered=base, fused=fused, site=site)


class _WholeWeight(torch.autograd.Function):
    """Passes a gradient of the whole weight, where one exists, on to W and to the adapters' parameters."""

    @staticmethod
    def forward(
        ctx: Any, adapters: BoundAdapters, fused: bool, site: str, base: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(base, *parameters)
        ctx.adapters = [(adapter.planned, tuple(adapter.parameters)) for adapter in adapters]
        return AdaptedWeight(base, adapters, registered=base, fused=fused, site=site)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        base, *parameters = ctx.saved_tensors

        def run(base: torch.Tensor, *parameters: torch.Tensor) -> list[torch.Tensor]:
            rest = iter(parameters)
            bound = [BoundAdapter(planned, {n: next(rest) for n in names}) for planned, names in ctx.adapters]
            return [adapted_sum(base, bound)]

        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        needed = ctx.needs_input_grad[3:]
        return None, None, None, *differentiate(run, (base, *parameters), needed, (gradient,))


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: AdaptedWeight) -> AdaptedWeight:
        return weight.transposed()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient.to_dense() if gradient.is_sparse else gradient).t()


def _assert_gathered(*args: Any) -> None:
    for one in args:
        if isinstance(one, WeightSum):
            assert_gathered(one.base, one.site)


def _has_watched(args: Sequence[Any]) -> bool:
    return any(isinstance(one, WeightSum) and one.is_watched for one in args)


def _transpose(weight: Any, *dims: int) -> Any:
    if weight.dim() != 2 or (dims and {d % 2 for d in dims} != {0, 1}):
        return NotImplemented
    if torch.is_grad_enabled() and weight.needs_gradient():
        return _Transposed.apply(weight)  # type: ignore[no-untyped-call]
    return weight.transposed()


def _copy_deeply(weight: WeightSum, memo: dict[int, Any]) -> torch.Tensor:
    return copy.deepcopy(weight.read_values(), memo)


def _watch(name: str) -> Callable[..., Any]:
    """The handler of a method that needs the gradient of the whole weight."""

    def run(weight: WeightSum, *args: Any, **kwargs: Any) -> Any:
        """Call the method; from now on operators use the tensor itself, so that autograd computes its gradient."""
        weight.is_watched = True
        with WithoutTorchFunction():
            return getattr(torch.Tensor, name)(weight, *args, **kwargs)

    return run


def _set_requires_grad(weight: WeightSum, requires_grad: bool = True) -> WeightSum:
    weight.registered.requires_grad_(requires_grad)
    return weight


def _read_grad(weight: WeightSum) -> torch.Tensor | None:
    if not weight.is_watched:
        return weight.registered.grad
    with WithoutTorchFunction():
        return weight.grad


def _write_grad(weight: WeightSum, gradient: torch.Tensor | None) -> None:
    weight.registered.grad = gradient


def _is_leaf(weight: WeightSum) -> bool:
    """True, as for the parameter: ``nn.Module`` asks for it before it registers one."""
    return True


def _read_grad_fn(weight: WeightSum) -> None:
    """``None``, as for the parameter."""


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


def _setter(name: str) -> Any:
    return getattr(torch.Tensor, name).__set__


#: Operators that need no values.
_PROPERTIES = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *map(_getter, ("is_meta", "is_sparse", "is_quantized", "itemsize", "is_cpu", "is_mps", "is_xpu", "_version")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.ndimension, torch.Tensor.__len__,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.stride, torch.Tensor.is_contiguous,
    torch.Tensor.element_size, torch.Tensor.get_device, torch.Tensor.nelement, torch.Tensor.__hash__,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.Tensor.storage_offset,
}  # fmt: skip

#: The handlers of operators; their parameters have the names of torch's.
_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    F.linear: run_linear,
    F.embedding: run_embedding,
    F.multi_head_attention_forward: run_attention,
    torch.matmul: run_matmul,
    torch.mm: run_matmul,
    torch.bmm: run_bmm,
    torch.addmm: run_addmm,
    torch.Tensor.matmul: run_matmul,
    torch.Tensor.mm: run_matmul,
    torch.Tensor.bmm: run_bmm,
    torch.Tensor.addmm: run_addmm,
    torch.Tensor.__matmul__: run_matmul,
    torch.Tensor.__rmatmul__: run_reflected_matmul,
    torch.conv1d: make_convolution(torch.conv1d, 1),
    torch.conv2d: make_convolution(torch.conv2d, 2),
    torch.conv3d: make_convolution(torch.conv3d, 3),
    torch.t: _transpose,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    torch.Tensor.t: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.Tensor.swapaxes: _transpose,
    _getter("T"): _transpose,
    _getter("mT"): _transpose,
    _getter("data"): WeightSum.detached,
    SET_DATA: write_data,
    _getter("grad"): _read_grad,
    _setter("grad"): _write_grad,
    _getter("is_leaf"): _is_leaf,
    _getter("grad_fn"): _read_grad_fn,
    torch.Tensor.register_hook: _watch("register_hook"),
    torch.Tensor.retain_grad: _watch("retain_grad"),
    _getter("requires_grad"): WeightSum.needs_gradient,
    _setter("requires_grad"): _set_requires_grad,
    torch.Tensor.requires_grad_: _set_requires_grad,
    torch.Tensor.detach: WeightSum.detached,
    torch.Tensor.__deepcopy__: _copy_deeply,
    torch.Tensor.__repr__: WeightSum.__repr__,
}

#: Keywords that mean the same in torch's operators and in the handlers.
_SHARED_KEYWORDS = frozenset(
    {"input", "weight", "bias", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"}
) | {"stride", "padding", "dilation", "groups", "requires_grad"}


#: The operators that compute with the factors.
_PRODUCTS = frozenset(
    func
    for func, handler in _HANDLERS.items()
    if handler in (run_linear, run_embedding, run_attention, run_matmul, run_bmm, run_addmm, run_reflected_matmul)
    or func in (torch.conv1d, torch.conv2d, torch.conv3d)
)


def _find_keywords(handler: Callable[..., Any]) -> frozenset[str]:
    """The keywords that a handler takes; attention passes all of them on."""
    if handler is run_attention:
        return frozenset(inspect.signature(F.multi_head_attention_forward).parameters)
    return frozenset(inspect.signature(handler).parameters) & _SHARED_KEYWORDS


_KEYWORDS: Mapping[Any, frozenset[str]] = {func: _find_keywords(handler) for func, handler in _HANDLERS.items()}

#: The handlers that also apply to a watched weight; every other operator runs on it as on a tensor with history.
_HANDLED_WHEN_WATCHED = frozenset({_getter(n) for n in ("grad", "data", "grad_fn", "is_leaf", "requires_grad")}) | {
    torch.Tensor.register_hook,
    torch.Tensor.retain_grad,
}
