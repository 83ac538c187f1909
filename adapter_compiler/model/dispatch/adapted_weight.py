"""A weight that knows its adapters: W + ΔW, whose values exist only where an operator asks for them.

    F.linear(x, w), x @ w, x @ w.T, torch.addmm(b, x, w), torch.bmm(x, w)   run on activations,
    F.embedding(i, w), conv1d, conv2d, conv3d                               y + form(x)
    everything else                                                         runs on the sum of W and ΔW

It is a tensor with W's shape and dtype and no memory. Python operators ask ``__torch_function__``; what comes past
that (the inside of an ``autograd.Function``, TorchScript, C++) asks ``__torch_dispatch__``, and gets the values; a
gradient for the whole weight, from wherever, is handed on to the adapters' parameters.

What is written is what is read: changes in place, of the weight or of a view of it (``w.mul_``, ``w[0].zero_``,
``w.data = v``, everything of ``torch.nn.init``), change W so that W + ΔW is the result.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.functional import linear
from torch.utils import _pytree as pytree

from adapter_compiler.errors import AdapterCompilerError
from adapter_compiler.model.dispatch.attention import run_attention
from passes.adapt.apply_adapters import BoundAdapter, adapted_linear, adapted_output, adapted_sum
from passes.forms.base import OperatorCall
from passes.fuse.differentiate import differentiate
from passes.fuse.fused_ops import Recomputation
from passes.quantize.packed_weights import PackedWeight
from passes.quantize.recompute_weights import packed_linear

aten = torch.ops.aten

Bound = tuple[BoundAdapter, ...]


class AdaptedWeight(torch.Tensor):
    """W + ΔW, see the module's text. Made by :func:`make_adapted_weight`, at each read anew.

    Attributes:
        base: W.
        registered: the parameter or computed weight that W is read from; writes go there.
        adapters: the adapters with their parameters as they were at the read.
        fused: whether functions with a backward of their own may be used.
        site: the weight's qualified name, for messages.
        is_transposed: whether this is (W + ΔW)ᵀ.
        is_watched: whether somebody wants the gradient of the whole weight, so that it has to exist.
        slot: what stands at the weight.
    """

    base: torch.Tensor
    registered: torch.Tensor
    adapters: Bound
    fused: bool
    site: str
    is_transposed: bool
    is_watched: bool
    slot: Any = None
    _sum: torch.Tensor | None
    _key: tuple[Any, ...] | None
    _plain: tuple[torch.Tensor, WeightView] | None
    #: What ``isinstance(weight, nn.Parameter)`` asks for: to users' code it is the parameter that it stands for.
    _is_param = True

    @staticmethod
    def __new__(
        cls,
        base: torch.Tensor,
        adapters: Bound,
        *,
        registered: torch.Tensor,
        fused: bool,
        site: str,
        is_transposed: bool = False,
    ) -> AdaptedWeight:
        """A tensor without memory; all arguments are attributes."""
        shape, strides = base.shape, None if isinstance(base, PackedWeight) else base.stride()
        if is_transposed:
            shape = torch.Size((shape[1], shape[0]))
            strides = None if strides is None else (strides[1], strides[0])
        made: AdaptedWeight = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=base.dtype, device=base.device
        )
        made.base, made.adapters, made.registered = base, adapters, registered
        made.fused, made.site, made.is_transposed, made.is_watched = fused, site, is_transposed, False
        made._sum = made._key = made._plain = None
        return made

    def materialize(self) -> torch.Tensor:
        """The values as a plain tensor with a history that leads to the adapters; made once while nothing changes."""
        key = (torch.is_grad_enabled(), *(_version_of(t) for t in _operands(self)))
        if self._sum is None or self._key != key:
            total = adapted_sum(self.base, self.adapters)
            self._sum, self._key = total.t() if self.is_transposed else total, key
        return self._sum

    def as_values(self) -> WeightView:
        """The values as an ordinary tensor, through which writes still find their way to the weight."""
        total = self.materialize()
        if self._plain is None or self._plain[0] is not total:
            self._plain = (total, _view(total, self, is_whole=True))
        return self._plain[1]

    def take_over(self) -> None:
        """Change W so that W + ΔW is what stands in the materialized sum by now."""
        _assert_writable(self)
        assert self._sum is not None
        with torch.inference_mode(False), torch.no_grad():
            total = self._sum.clone()
            total = total.t() if self.is_transposed else total
            self.registered.data = total - (adapted_sum(self.base, self.adapters) - self.base).detach()
            if self.base is not self.registered:
                self.base = self.registered.detach()
        self._key = None

    def detached(self) -> AdaptedWeight:
        """The same without history."""
        adapters = tuple(
            BoundAdapter(a.planned, {n: p.detach() for n, p in a.parameters.items()}) for a in self.adapters
        )
        return self._with(self.base.detach(), adapters)

    def turned(self) -> AdaptedWeight:
        """The transpose."""
        return self._with(self.base, self.adapters, is_transposed=not self.is_transposed)

    def _with(self, base: torch.Tensor, adapters: Bound, is_transposed: bool | None = None) -> AdaptedWeight:
        return AdaptedWeight(
            base,
            adapters,
            registered=self.registered,
            fused=self.fused,
            site=self.site,
            is_transposed=self.is_transposed if is_transposed is None else is_transposed,
        )

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run on activations what can; on the sum what cannot."""
        kwargs = kwargs or {}
        if func in _ON_SELF:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if any(isinstance(one, AdaptedWeight) and one.is_watched for one in args) and func not in _HANDLES_WATCHED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if (handler := _HANDLERS.get(func)) is not None and kwargs.keys() <= _ACCEPTED[func]:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        return run_on_sums(func, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{self.materialize()!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """What is below autograd sees values; history is kept by :class:`_WholeWeight`."""
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0].detached()
        args, kwargs = pytree.tree_map_only(AdaptedWeight, _read_values, (args, kwargs))
        return func(*args, **kwargs)


def make_adapted_weight(base: torch.Tensor, adapters: Bound, *, fused: bool, site: str) -> AdaptedWeight:
    """W + ΔW as a read gives it."""
    if torch.is_grad_enabled():
        parameters = [p for adapter in adapters for p in adapter.parameters.values()]
        made: AdaptedWeight = _WholeWeight.apply(adapters, fused, site, base, *parameters)  # type: ignore[no-untyped-call]
        return made
    return AdaptedWeight(base, adapters, registered=base, fused=fused, site=site)


class _WholeWeight(torch.autograd.Function):
    """Hands a gradient of the whole weight on to the base and the adapters' parameters."""

    @staticmethod
    def forward(
        ctx: Any, adapters: Bound, fused: bool, site: str, base: torch.Tensor, *parameters: torch.Tensor
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


def _requires_grad(weight: AdaptedWeight) -> bool:
    parameters = (p for adapter in weight.adapters for p in adapter.parameters.values())
    return weight.base.requires_grad or any(p.requires_grad for p in parameters)


def _read_values(weight: AdaptedWeight) -> torch.Tensor:
    with torch.no_grad():
        return weight.materialize().detach()


def _operands(weight: AdaptedWeight) -> Iterator[torch.Tensor]:
    yield weight.base
    for adapter in weight.adapters:
        yield from adapter.parameters.values()


def _version_of(tensor: torch.Tensor) -> Any:
    """Another one after each change in place; inference tensors have none, and each gets one of its own here."""
    return object() if tensor.is_inference() else tensor._version


def run_on_sums(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator on materialized sums; what it writes into them goes to the weights."""
    weights = {id(leaf): leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, AdaptedWeight)}
    args, kwargs = pytree.tree_map_only(AdaptedWeight, AdaptedWeight.materialize, (tuple(args), dict(kwargs)))
    if weights and kwargs.get("sparse") is True:
        kwargs["sparse"] = False  # the gradient of a table with an adapter has no zero rows to leave out
    return give_back(func, lambda: func(*args, **kwargs), list(weights.values()))


def give_back(func: Callable[..., Any], run: Callable[[], Any], weights: Sequence[AdaptedWeight]) -> Any:
    """Run an operator on the sums of weights, let the weights take over what it changed, and mark views of the sums."""
    tracked = [(weight, weight._sum) for weight in weights if weight._sum is not None]
    before = [None if total.is_inference() else total._version for _, total in tracked]
    result = run()
    for (weight, total), version in zip(tracked, before, strict=True):
        # Inference tensors do not say that they were changed, so the name of the operator has to.
        if _is_in_place(func) if version is None else total._version != version:
            weight.take_over()
    return pytree.tree_map_only(torch.Tensor, lambda t: _mark(t, tracked), result) if tracked else result


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = str(getattr(func, "__name__", func))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _mark(result: torch.Tensor, tracked: Sequence[tuple[AdaptedWeight, torch.Tensor]]) -> torch.Tensor:
    """The result as something whose changes find their way to the weight, where it shares memory with a sum."""
    for weight, total in tracked:
        if result is total:
            return weight
        if type(result) is torch.Tensor and result.layout is torch.strided and _share_memory(result, total):
            return _view(result, weight)
    return result


def _view(values: torch.Tensor, weight: AdaptedWeight, *, is_whole: bool = False) -> WeightView:
    view = values.as_subclass(WeightView)
    view.weight, view.is_whole = weight, is_whole
    return view


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


class WeightView(torch.Tensor):
    """A view of a materialized sum, through which a write finds its way to the weight.

    Attributes:
        weight: the weight.
        is_whole: whether it stands for the weight itself, so that ``.data`` assigned to it is the weight's.
    """

    weight: AdaptedWeight
    is_whole: bool

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.as_subclass(torch.Tensor))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run on plain tensors, and let the weight take over what is written."""
        if func == _SET_DATA and isinstance(args[0], WeightView) and args[0].is_whole:
            _write_data(args[0].weight, args[1])
            return None
        views = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, WeightView)]
        weights = {id(view.weight): view.weight for view in views}
        args, kwargs = pytree.tree_map_only(AdaptedWeight, AdaptedWeight.materialize, (tuple(args), dict(kwargs or {})))

        def run() -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        return give_back(func, run, list(weights.values()))


def _assert_writable(weight: AdaptedWeight) -> None:
    if isinstance(weight.base, PackedWeight) or any(a.planned.form.rescales for a in weight.adapters):
        raise AdapterCompilerError(
            f"something writes into {weight.site}, whose W is quantized or rescaled by its adapter, so that no W gives "
            f"the result; expected no write; write into adapted.base_weight({weight.site!r}) or exclude the weight"
        )


def _linear(input: Any, weight: Any, bias: Any = None) -> Any:
    if isinstance(input, AdaptedWeight) or isinstance(bias, AdaptedWeight):
        return NotImplemented
    return run_linear(input, weight, bias)


def run_linear(
    x: torch.Tensor, weight: AdaptedWeight, bias: torch.Tensor | None, again: Recomputation | None = None
) -> Any:
    """X W'ᵀ + b."""
    if weight.dim() != 2:
        return NotImplemented
    base = weight.base.t() if weight.is_transposed else weight.base
    return multiply(x, base, bias, weight.adapters, stored_in_out=weight.is_transposed, fused=weight.fused, again=again)


def multiply(
    x: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: Bound,
    *,
    stored_in_out: bool,
    fused: bool,
    again: Recomputation | None = None,
) -> Any:
    """X M'ᵀ + b for a matrix M [out, in], the weight or its transpose.

    Args:
        x: [..., in].
        matrix: M.
        bias: b or ``None``.
        adapters: those of the weight.
        stored_in_out: whether M is the weight's transpose.
        fused: whether functions with a backward of their own may be used.
        again: how backward can make x once more.
    """
    if x.is_nested:
        return NotImplemented
    (first, *others) = adapters
    if not others and first.planned.site.transposed == stored_in_out and (factors := first.factors) is not None:
        return adapted_linear(x, matrix, bias, first, factors, fused=fused, again=again)
    product = packed_linear if isinstance(matrix, PackedWeight) else linear
    call = OperatorCall(product, (x, matrix, bias))
    weight = matrix.t() if stored_in_out else matrix
    found = adapted_output("product", call, x, weight, adapters, transposed=stored_in_out)
    return NotImplemented if found is None else found


def _matmul(x: Any, weight: Any) -> Any:
    if isinstance(x, AdaptedWeight) or not isinstance(weight, AdaptedWeight):
        return NotImplemented
    if weight.dim() == 2:
        matrix = weight.base if weight.is_transposed else weight.base.t()
        return multiply(x, matrix, None, weight.adapters, stored_in_out=not weight.is_transposed, fused=weight.fused)
    return _stack(x, weight)


def _stack(x: Any, weight: AdaptedWeight) -> Any:
    if weight.dim() != 3 or x.dim() < 2:
        return NotImplemented
    target = aten.bmm.default if x.dim() == 3 and len(x) == len(weight) else aten.matmul.default
    call = OperatorCall(target, (x, weight.base))
    found = adapted_output("stack", call, x, weight.base, weight.adapters, transposed=True)
    return NotImplemented if found is None else found


def _bmm(x: Any, weight: Any) -> Any:
    if isinstance(x, AdaptedWeight) or not isinstance(weight, AdaptedWeight):
        return NotImplemented
    return _stack(x, weight) if len(x) == len(weight) else NotImplemented


def _reflected_matmul(weight: Any, x: Any) -> Any:
    return _matmul(x, weight)


def _addmm(bias: Any, x: Any, weight: Any, **options: Any) -> Any:
    if options or isinstance(bias, AdaptedWeight) or isinstance(x, AdaptedWeight) or bias.dim() != 1:
        return NotImplemented
    matrix = weight.base if weight.is_transposed else weight.base.t()
    return multiply(x, matrix, bias, weight.adapters, stored_in_out=not weight.is_transposed, fused=weight.fused)


def _embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    if max_norm is not None or scale_grad_by_freq or weight.is_transposed or weight.dim() != 2:
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    call = OperatorCall(aten.embedding.default, (weight.base, input, padding))
    found = adapted_output("lookup", call, input, weight.base, weight.adapters, transposed=False)
    return NotImplemented if found is None else found


def _make_convolution(target: Callable[..., torch.Tensor], spatial: int) -> Callable[..., Any]:
    def convolve(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if groups != 1 or isinstance(input, AdaptedWeight) or input.dim() != spatial + 2:
            return NotImplemented
        call = OperatorCall(target, (input, weight.base, bias, stride, padding, dilation))
        found = adapted_output("convolution", call, input, weight.base, weight.adapters, transposed=False)
        return NotImplemented if found is None else found

    return convolve


def _transpose(weight: Any, *dims: int) -> Any:
    if weight.dim() != 2 or (dims and {d % 2 for d in dims} != {0, 1}):
        return NotImplemented
    if torch.is_grad_enabled() and _requires_grad(weight):
        return _Transposed.apply(weight)  # type: ignore[no-untyped-call]
    return weight.turned()


class _Transposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: AdaptedWeight) -> AdaptedWeight:
        return weight.turned()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return (gradient.to_dense() if gradient.is_sparse else gradient).t()


def _copy_deeply(weight: AdaptedWeight, memo: dict[int, Any]) -> torch.Tensor:
    return copy.deepcopy(_read_values(weight), memo)


def _write_data(weight: AdaptedWeight, values: torch.Tensor) -> None:
    weight._sum = values
    weight.take_over()


def _watch(name: str) -> Callable[..., Any]:
    def run(weight: AdaptedWeight, *args: Any, **kwargs: Any) -> Any:
        """From now on products go through the weight itself, so that its gradient exists."""
        weight.is_watched = True
        with torch._C.DisableTorchFunctionSubclass():
            return getattr(torch.Tensor, name)(weight, *args, **kwargs)

    return run


def _require_grad(weight: AdaptedWeight, requires_grad: bool = True) -> AdaptedWeight:
    weight.registered.requires_grad_(requires_grad)
    return weight


def _read_grad(weight: AdaptedWeight) -> torch.Tensor | None:
    if not weight.is_watched:
        return weight.registered.grad
    with torch._C.DisableTorchFunctionSubclass():
        return weight.grad


def _is_a_leaf(weight: AdaptedWeight) -> bool:
    """As the parameter that it stands for, also where modules ask before they register it."""
    return True


def _has_no_history(weight: AdaptedWeight) -> None:
    """Likewise."""


def _write_grad(weight: AdaptedWeight, gradient: torch.Tensor | None) -> None:
    weight.registered.grad = gradient


def _read_data(weight: AdaptedWeight) -> AdaptedWeight:
    return weight.detached()


def _getter(name: str) -> Any:
    return getattr(torch.Tensor, name).__get__


def _setter(name: str) -> Any:
    return getattr(torch.Tensor, name).__set__


_SET_DATA = _setter("data")

#: What a read tells of itself without its values.
_ON_SELF = {
    *map(_getter, ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *map(_getter, ("is_meta", "is_sparse", "is_quantized", "itemsize", "is_cpu", "is_mps", "is_xpu", "_version")),
    torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.ndimension, torch.Tensor.__len__,
    torch.Tensor.is_floating_point, torch.Tensor.is_complex, torch.Tensor.stride, torch.Tensor.is_contiguous,
    torch.Tensor.element_size, torch.Tensor.get_device, torch.Tensor.nelement, torch.Tensor.__hash__,
    torch.is_floating_point, torch.is_complex, torch.numel, torch.Tensor.storage_offset,
}  # fmt: skip

#: What runs in place of an operator, if it applies; its parameters have the names that torch's have.
_HANDLERS: Mapping[Any, Callable[..., Any]] = {
    F.linear: _linear,
    F.embedding: _embedding,
    F.multi_head_attention_forward: run_attention,
    torch.matmul: _matmul,
    torch.mm: _matmul,
    torch.bmm: _bmm,
    torch.addmm: _addmm,
    torch.Tensor.matmul: _matmul,
    torch.Tensor.mm: _matmul,
    torch.Tensor.bmm: _bmm,
    torch.Tensor.addmm: _addmm,
    torch.Tensor.__matmul__: _matmul,
    torch.Tensor.__rmatmul__: _reflected_matmul,
    torch.conv1d: _make_convolution(torch.conv1d, 1),
    torch.conv2d: _make_convolution(torch.conv2d, 2),
    torch.conv3d: _make_convolution(torch.conv3d, 3),
    torch.t: _transpose,
    torch.transpose: _transpose,
    torch.swapaxes: _transpose,
    torch.Tensor.t: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.Tensor.swapaxes: _transpose,
    _getter("T"): _transpose,
    _getter("mT"): _transpose,
    _getter("data"): _read_data,
    _SET_DATA: _write_data,
    _getter("grad"): _read_grad,
    _getter("is_leaf"): _is_a_leaf,
    _getter("grad_fn"): _has_no_history,
    torch.Tensor.register_hook: _watch("register_hook"),
    torch.Tensor.retain_grad: _watch("retain_grad"),
    _setter("grad"): _write_grad,
    _getter("requires_grad"): _requires_grad,
    _setter("requires_grad"): _require_grad,
    torch.Tensor.detach: _read_data,
    torch.Tensor.__deepcopy__: _copy_deeply,
    torch.Tensor.__repr__: AdaptedWeight.__repr__,
    torch.Tensor.requires_grad_: _require_grad,
}

_TORCHS_OWN = frozenset(
    {"input", "weight", "bias", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"}
)
_TORCHS_OWN |= {"stride", "padding", "dilation", "groups", "requires_grad"}


def _find_accepted(handler: Callable[..., Any]) -> frozenset[str]:
    """The keywords that a handler takes; all of them for attention, which hands them on."""
    if handler is run_attention:
        return frozenset(inspect.signature(F.multi_head_attention_forward).parameters)
    return frozenset(inspect.signature(handler).parameters) & _TORCHS_OWN


_ACCEPTED: Mapping[Any, frozenset[str]] = {func: _find_accepted(handler) for func, handler in _HANDLERS.items()}

#: What a watched weight answers itself; everything else runs on it as on any tensor with a history.
_HANDLES_WATCHED = frozenset({_getter(n) for n in ("grad", "data", "grad_fn", "is_leaf", "requires_grad")}) | {
    torch.Tensor.register_hook,
    torch.Tensor.retain_grad,
}
