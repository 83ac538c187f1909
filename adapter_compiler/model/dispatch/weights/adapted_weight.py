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
from torch.utils.hooks import RemovableHandle

from adapter_compiler.errors import AdapterCompilerError
from adapter_compiler.model.dispatch.hooks import WeightHooks
from adapter_compiler.model.dispatch.slots import assert_gathered
from adapter_compiler.model.dispatch.weights.attention import run_attention
from adapter_compiler.model.dispatch.weights.history import (
    BoundAdapters,
    differentiate_sum,
    find_parameters,
    keep_operands,
    outside_inference_mode,
)
from adapter_compiler.model.dispatch.weights.products import (
    make_convolution,
    run_addmm,
    run_bmm,
    run_embedding,
    run_linear,
    run_matmul,
    run_reflected_matmul,
)
from adapter_compiler.model.dispatch.weights.weight_sum import WeightSum
from adapter_compiler.model.dispatch.weights.writes import (
    SET_DATA,
    is_in_place,
    read_data,
    run_on_itself,
    run_on_values,
    run_with_writes_below,
    write_data,
)
from passes.compat import WithoutTorchFunction, pytree


class AdaptedWeight(WeightSum):
    """W + ΔW as a read gives it; see the module's docstring. Each read makes one with :func:`make_adapted_weight`."""

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the handler of an operator if it has one that accepts the arguments, else run it on the values."""
        kwargs = kwargs or {}
        if func in _PROPERTIES:
            with WithoutTorchFunction():
                return func(*args, **kwargs)
        is_own = isinstance(args[0], WeightSum) if args else False
        if func in _METHODS:
            return _METHODS[func](*args, **kwargs) if is_own else run_on_values(func, args, kwargs)
        if func not in _OUT_OF_TORCH and not is_in_place(func) and _has_watched(args, kwargs):
            return run_on_itself(func, args, kwargs)
        if (handler := _HANDLERS.get(func)) is not None and kwargs.keys() <= _KEYWORDS[func]:
            if func in _PRODUCTS:
                _assert_gathered(*args, *kwargs.values())
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return run_on_values(func, args, kwargs)

    @classmethod
    def run_below_autograd(cls, func: Any, values: Any, arguments: Any) -> Any:
        """Run an operator on the values; what it writes changes W."""
        return run_with_writes_below(func, values, arguments)


def make_adapted_weight(base: torch.Tensor, adapters: BoundAdapters, *, fused: bool, site: str) -> AdaptedWeight:
    """W + ΔW as a read gives it.

    Args:
        base: W.
        adapters: the adapters of the weight.
        fused: whether functions with their own backward may be used.
        site: the weight's qualified name, for messages.
    """
    parameters = find_parameters(adapters)
    if not any(tensor.requires_grad for tensor in (base, *parameters)):
        with outside_inference_mode(base):
            return AdaptedWeight(base, adapters, registered=base, fused=fused, site=site)
    # A weight that is read under no_grad or in inference mode may be kept and used where gradients are enabled.
    with outside_inference_mode(base), torch.enable_grad():
        made: AdaptedWeight = _WholeWeight.apply(adapters, fused, site, base, *parameters)  # type: ignore[no-untyped-call]
    return made


class _WholeWeight(torch.autograd.Function):
    """Passes a gradient of the whole weight, where one exists, on to W and to the adapters' parameters."""

    @staticmethod
    def forward(
        ctx: Any, adapters: BoundAdapters, fused: bool, site: str, base: torch.Tensor, *parameters: torch.Tensor
    ) -> torch.Tensor:
        made = AdaptedWeight(base, adapters, registered=base, fused=fused, site=site)
        keep_operands(ctx, base, adapters, made.used_versions)
        return made

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return None, None, None, *differentiate_sum(ctx, gradient, ctx.needs_input_grad[3:])


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


def _has_watched(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    leaves = pytree.tree_leaves((args, kwargs))
    return any(isinstance(one, WeightSum) and one.is_watched for one in leaves)


def _transpose(weight: Any, *dims: int) -> Any:
    if weight.dim() != 2 or (dims and {d % 2 for d in dims} != {0, 1}):
        return NotImplemented
    if not torch.is_grad_enabled():
        return weight.detached().transposed()
    if weight.is_detached or not weight.needs_gradient():
        return weight.transposed()
    return _Transposed.apply(weight)  # type: ignore[no-untyped-call]


def _copy_deeply(weight: WeightSum, memo: dict[int, Any]) -> torch.Tensor:
    return copy.deepcopy(_as_plain(weight), memo)


def _reduce(weight: WeightSum, protocol: Any) -> Any:
    return _as_plain(weight).__reduce_ex__(protocol)


def _as_plain(weight: WeightSum) -> torch.Tensor:
    """The values as the tensor or parameter that this weight is without adapters."""
    values, needed = weight.read_values(), weight.needs_gradient()
    if isinstance(weight, torch.nn.Parameter):
        return torch.nn.Parameter(values, requires_grad=needed)
    return values.requires_grad_(needed)


def _retain_gradient(weight: WeightSum) -> None:
    """From now on operators use the tensor itself, so that autograd computes its gradient."""
    watch(weight)
    with WithoutTorchFunction():
        weight.retain_grad()


def _register_hook(weight: WeightSum, hook: Callable[[torch.Tensor], Any]) -> RemovableHandle:
    """A hook on a read stays with the weight, as a hook on a parameter does."""
    if weight.slot is None or weight.is_transposed:
        watch(weight)
        with WithoutTorchFunction():
            handle: RemovableHandle = weight.register_hook(hook)  # type: ignore[no-untyped-call]
        return handle
    if not weight.needs_gradient():
        raise RuntimeError("cannot register a hook on a tensor that doesn't require gradient")
    made: RemovableHandle = weight.slot.hooks.add(weight.registered, hook)
    watch_with_hooks(weight, weight.slot.hooks)
    return made


def watch(weight: WeightSum) -> None:
    """Let operators use the tensor itself from now on, so that autograd computes the gradient of the whole weight."""
    weight.is_watched = True


def watch_with_hooks(weight: WeightSum, hooks: WeightHooks) -> None:
    """Watch a weight, and run the hooks that its slot has then on its gradient; once for each weight."""
    watch(weight)
    if not weight.has_hooks and weight.needs_gradient():
        weight.has_hooks = True
        with WithoutTorchFunction():
            weight.register_hook(hooks.make_runner(weight.registered))  # type: ignore[no-untyped-call]


def _refuse_hook(weight: WeightSum, hook: Any) -> None:
    raise AdapterCompilerError(
        f"{weight.site} has an adapter and accumulates no gradient, so that no hook can run after it; expected a hook "
        "on a parameter of the adapter; register it on one of adapted.adapters.parameters()"
    )


def _set_requires_grad(weight: WeightSum, requires_grad: bool = True) -> WeightSum:
    if weight.is_detached:
        weight.is_watched = weight.is_watched or requires_grad
        with WithoutTorchFunction():
            weight.requires_grad_(requires_grad)
    else:
        weight.registered.requires_grad_(requires_grad)
    return weight


def _read_grad(weight: WeightSum) -> torch.Tensor | None:
    with WithoutTorchFunction():
        return weight.grad if weight.is_leaf or weight.retains_grad else weight.registered.grad


def _write_grad(weight: WeightSum, gradient: torch.Tensor | None) -> None:
    target = weight if weight.is_detached else weight.registered
    with WithoutTorchFunction():
        target.grad = gradient


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
}

#: The methods of a weight itself; they also apply to a watched weight, on which every other operator runs as on a
#: tensor with history.
_METHODS: Mapping[Any, Callable[..., Any]] = {
    _getter("data"): read_data,
    SET_DATA: write_data,
    _getter("grad"): _read_grad,
    _setter("grad"): _write_grad,
    _getter("is_leaf"): _is_leaf,
    _getter("grad_fn"): _read_grad_fn,
    torch.Tensor.register_hook: _register_hook,
    torch.Tensor.register_post_accumulate_grad_hook: _refuse_hook,
    torch.Tensor.retain_grad: _retain_gradient,
    _getter("requires_grad"): WeightSum.needs_gradient,
    _setter("requires_grad"): _set_requires_grad,
    torch.Tensor.requires_grad_: _set_requires_grad,
    torch.Tensor.detach: WeightSum.detached,
    torch.Tensor.__deepcopy__: _copy_deeply,
    torch.Tensor.__reduce_ex__: _reduce,
    torch.Tensor.__repr__: WeightSum.__repr__,
}

#: Functions that give memory or numbers to others than torch, and so need the values.
_OUT_OF_TORCH = frozenset(
    getattr(torch.Tensor, name)
    for name in (
        "tolist", "numpy", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage", "__format__", "item",
    )
)  # fmt: skip

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
