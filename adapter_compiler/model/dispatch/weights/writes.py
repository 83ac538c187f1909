"""Writes into an adapted weight: a change of W + ΔW becomes a change of W.

After ``w.mul_(2)``, ``w[0].zero_()``, ``w.copy_(v)``, ``w.data = v`` or a function of ``torch.nn.init``, a read gives
what was written: W changes such that W + ΔW is the result. The operator runs on the values of W + ΔW; if their version
changed, W is updated. A result that shares memory with the values is returned as a :class:`WeightView`, so that writes
through it are noticed too.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from adapter_compiler.errors import AdapterCompilerError
from adapter_compiler.model.dispatch.weights.history import written
from adapter_compiler.model.dispatch.weights.weight_sum import WeightSum
from passes.adapt.apply_adapters import adapted_sum
from passes.compat import WithoutTorchFunction, is_wrapped, pytree, schema_of, version_of
from passes.quantize.packed_weights import PackedWeight


class Tracked(NamedTuple):
    """A weight among the arguments of an operator.

    Attributes:
        weight: the weight.
        total: the values of it that the operator gets.
        versions: the versions of W and the adapters for which they are right.
        witness: the argument itself, whose version also changes when the operator writes into it.
    """

    weight: WeightSum
    total: torch.Tensor
    versions: list[Any]
    witness: torch.Tensor

    def find_version(self) -> tuple[int, int, bool] | None:
        """A value that differs after a write; ``None`` for inference tensors, which have no version."""
        with WithoutTorchFunction():
            if self.total.is_inference() or self.witness.is_inference():
                return None
            return version_of(self.total), version_of(self.witness), self.weight.pin.is_written


#: The function that ``weight.data = ...`` calls.
SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class WeightView(torch.Tensor):
    """A view of the values of W + ΔW; writes through it change W.

    Attributes:
        weight: the weight.
        total: the values that this is a view of.
        versions: the versions of W and the adapters for which ``total`` is right.
    """

    weight: WeightSum
    total: torch.Tensor
    versions: list[Any]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator on plain tensors, and update W if it wrote into the view."""
        kwargs = kwargs or {}
        if func in _OF_PLAIN_TENSORS:
            return func(args[0].as_subclass(torch.Tensor), *args[1:], **kwargs)
        func = torch.Tensor.detach if func == _GET_DATA else func  # .data has a version of its own
        views = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, WeightView)]
        for view in views:
            view.weight.refresh(view.total, view.versions)
        tracked = [Tracked(view.weight, view.total, view.versions, view) for view in views]
        args, options = pytree.tree_map_only(WeightSum, _find_operand, (tuple(args), dict(kwargs)))
        if options.get("sparse") is True:
            options["sparse"] = False  # as in run_on_values

        def run() -> Any:
            with WithoutTorchFunction():
                return func(*args, **options)

        return _run_with_writes(func, run, tracked)


_GET_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]

#: Functions that would show or keep the subclass of a view.
_OF_PLAIN_TENSORS = frozenset(
    {torch.Tensor.__format__, torch.Tensor.__repr__, torch.Tensor.__deepcopy__, torch.Tensor.__reduce_ex__}
)


def _find_operand(weight: WeightSum) -> torch.Tensor:
    return weight if weight.is_watched else weight.materialize()


def write_data(weight: WeightSum, values: torch.Tensor) -> None:
    """``weight.data = values``: change W such that W + ΔW has these values.

    Raises:
        AdapterCompilerError: W is quantized, or the adapter rescales it.
    """
    _update_base(weight, values)


def run_on_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator on the values of all adapted weights among its arguments; what it writes changes W."""
    weights = _find_weights(args, kwargs)
    args, kwargs = pytree.tree_map_only(WeightSum, WeightSum.materialize, (tuple(args), dict(kwargs)))
    if weights and kwargs.get("sparse") is True:
        kwargs["sparse"] = False  # the gradient of an embedding with an adapter has no zero rows to leave out
    return _run_with_writes(func, lambda: func(*args, **kwargs), _find_totals(weights))


def run_on_itself(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator on the adapted weights, so that autograd computes their gradients; what it writes changes W."""
    weights = _find_weights(args, kwargs)

    def run() -> Any:
        with WithoutTorchFunction():
            return func(*args, **kwargs)

    with contextlib.ExitStack() as stack:
        for weight in weights:
            stack.enter_context(weight.pinned())
        return _run_with_writes(func, run, _find_totals(weights))


def run_with_writes_below(func: Any, values: Any, arguments: Any) -> Any:
    """Run an operator below autograd, and update each W whose values it changed.

    Args:
        func: the operator.
        values: its positional and keyword arguments, with values in place of the weights.
        arguments: the same with the weights.
    """
    args, kwargs = values
    if not schema_of(func).is_mutable:
        return func(*args, **kwargs)
    result = func(*args, **kwargs)
    for weight in _find_weights(*_find_written(func, *arguments)):
        if weight.pin.is_active:
            weight.pin.is_written = True
        elif weight.total is not None:
            _update_base(weight, weight.total)
    return result


def _find_written(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, Any]:
    """The arguments into which an operator writes; below autograd, writes do not change versions."""
    written = [a.alias_info is not None and a.alias_info.is_write for a in schema_of(func).arguments]
    names = [a.name for a in schema_of(func).arguments]
    positional = [value for value, is_written in zip(args, written, strict=False) if is_written]
    return positional, {
        n: kwargs[n] for n, is_written in zip(names, written, strict=True) if is_written and n in kwargs
    }


def _find_weights(args: Any, kwargs: Any) -> list[WeightSum]:
    leaves = pytree.tree_leaves((args, kwargs))
    return list({id(leaf): leaf for leaf in leaves if isinstance(leaf, WeightSum)}.values())


def _find_totals(weights: Sequence[WeightSum]) -> list[Tracked]:
    return [Tracked(w, w.total, w.total_versions, w.total) for w in weights if w.total is not None]


def _run_with_writes(func: Callable[..., Any], run: Callable[[], Any], tracked: Sequence[Tracked]) -> Any:
    """Run an operator on the values of weights, update each W whose values it changed, and return views as such.

    Args:
        func: the operator.
        run: calls it.
        tracked: the weights whose values it gets, with the values.

    Returns:
        The operator's result, in which views of the values are :class:`WeightView`.
    """
    before = [one.find_version() for one in tracked]
    result = run()
    for one, version in zip(tracked, before, strict=True):
        # Where there are no versions, the operator's name has to show whether it writes.
        if is_in_place(func) if version is None else one.find_version() != version:
            _update_base(one.weight, one.total)
            one.versions[:] = one.weight.find_versions()
    return pytree.tree_map_only(torch.Tensor, lambda t: _find_view(t, tracked), result) if tracked else result


def _update_base(weight: WeightSum, total: torch.Tensor) -> None:
    """Change W such that W + ΔW equals ``total``."""
    _assert_writable(weight)
    with torch.inference_mode(False), torch.no_grad():
        total = total.clone()
        total = total.t() if weight.is_transposed else total
        update = adapted_sum(weight.base, weight.adapters) - weight.base
        weight.registered.data = total - update.detach()
    written.count += 1
    weight.forget_values()


def _assert_writable(weight: WeightSum) -> None:
    if isinstance(weight.base, PackedWeight) or any(a.planned.form.rescales for a in weight.adapters):
        raise AdapterCompilerError(
            f"something writes into {weight.site}, whose W is quantized or rescaled by its adapter, so that no W gives "
            f"the result; expected no write; write into adapted.base_weight({weight.site!r}) or exclude the weight"
        )


def is_in_place(func: Callable[..., Any]) -> bool:
    """Whether an operator's name says that it writes into its first argument."""
    name = str(getattr(func, "__name__", func))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _find_view(result: torch.Tensor, tracked: Sequence[Tracked]) -> torch.Tensor:
    """The weight if the result is its values, a view if it shares their memory, otherwise the result itself."""
    for weight, total, versions, _ in tracked:
        if result is total:
            return weight
        is_ordinary = type(result) is torch.Tensor and result.layout is torch.strided and not is_wrapped(result)
        if is_ordinary and _share_memory(result, total):
            return _make_view(result, weight, total, versions)
    return result


def read_data(weight: WeightSum) -> torch.Tensor:
    """``weight.data``: the values, which have memory of their own; writes into them change W."""
    with torch.no_grad():
        total = weight.materialize()
        return _make_view(total.detach(), weight, total, weight.total_versions)


def _make_view(values: torch.Tensor, weight: WeightSum, total: torch.Tensor, versions: list[Any]) -> WeightView:
    view = values.as_subclass(WeightView)
    view.weight, view.total, view.versions = weight, total, versions
    return view


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
