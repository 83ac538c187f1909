"""Writes into an adapted weight: a change of W + ΔW becomes a change of W.

After ``w.mul_(2)``, ``w[0].zero_()``, ``w.copy_(v)``, ``w.data = v`` or a function of ``torch.nn.init``, a read gives
what was written: W changes such that W + ΔW is the result. The operator runs on the values of W + ΔW; if their version
changed, W is updated. A result that shares memory with the values is returned as a :class:`WeightView`, so that writes
through it are noticed too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.errors import AdapterCompilerError
from adapter_compiler.model.dispatch.weights.weight_sum import WeightSum
from passes.adapt.apply_adapters import adapted_sum
from passes.compat import WithoutTorchFunction, pytree, version_of
from passes.quantize.packed_weights import PackedWeight

#: The function that ``weight.data = ...`` calls.
SET_DATA: Any = torch.Tensor.data.__set__  # type: ignore[attr-defined]


class WeightView(torch.Tensor):
    """A view of the values of W + ΔW; writes through it change W.

    Attributes:
        weight: the weight.
        is_whole: whether this view is given to users in place of the weight, so that ``view.data = v`` writes to the
            weight.
    """

    weight: WeightSum
    is_whole: bool

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return repr(self.as_subclass(torch.Tensor))

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the operator on plain tensors, and update W if it wrote into the view."""
        if func == SET_DATA and isinstance(args[0], WeightView) and args[0].is_whole:
            write_data(args[0].weight, args[1])
            return None
        views = [leaf for leaf in pytree.tree_leaves((args, kwargs or {})) if isinstance(leaf, WeightView)]
        weights = {id(view.weight): view.weight for view in views}
        args, options = pytree.tree_map_only(WeightSum, WeightSum.materialize, (tuple(args), dict(kwargs or {})))
        if options.get("sparse") is True:
            options["sparse"] = False  # as in run_on_values

        def run() -> Any:
            with WithoutTorchFunction():
                return func(*args, **options)

        return run_with_writes(func, run, list(weights.values()))


def view_values(weight: WeightSum) -> torch.Tensor:
    """The values as an ordinary tensor; writes into it change W."""
    total = weight.materialize()
    if weight.total_view is None or weight.total_view[0] is not total:
        weight.total_view = (total, _make_view(total, weight, is_whole=True))
    return weight.total_view[1]


def write_data(weight: WeightSum, values: torch.Tensor) -> None:
    """``weight.data = values``: change W such that W + ΔW has these values.

    Raises:
        AdapterCompilerError: W is quantized, or the adapter rescales it.
    """
    weight.total = values
    _update_base(weight)


def run_on_values(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """Run an operator on the values of all adapted weights among its arguments; what it writes changes W."""
    weights = {id(leaf): leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, WeightSum)}
    args, kwargs = pytree.tree_map_only(WeightSum, WeightSum.materialize, (tuple(args), dict(kwargs)))
    if weights and kwargs.get("sparse") is True:
        kwargs["sparse"] = False  # the gradient of an embedding with an adapter has no zero rows to leave out
    return run_with_writes(func, lambda: func(*args, **kwargs), list(weights.values()))


def run_with_writes(func: Callable[..., Any], run: Callable[[], Any], weights: Sequence[WeightSum]) -> Any:
    """Run an operator on the values of weights, update each W whose values it changed, and return views as such.

    Args:
        func: the operator.
        run: calls it.
        weights: the weights whose values it gets.

    Returns:
        The operator's result, in which views of the values are :class:`WeightView`.
    """
    tracked = [(weight, weight.total) for weight in weights if weight.total is not None]
    before = [None if total.is_inference() else version_of(total) for _, total in tracked]
    result = run()
    for (weight, total), version in zip(tracked, before, strict=True):
        # Inference tensors have no version, so the operator's name has to show whether it writes.
        if _is_in_place(func) if version is None else version_of(total) != version:
            _update_base(weight)
    return pytree.tree_map_only(torch.Tensor, lambda t: _find_view(t, tracked), result) if tracked else result


def _update_base(weight: WeightSum) -> None:
    """Change W such that W + ΔW equals ``weight.total``."""
    _assert_writable(weight)
    assert weight.total is not None
    with torch.inference_mode(False), torch.no_grad():
        total = weight.total.clone()
        total = total.t() if weight.is_transposed else total
        weight.registered.data = total - (adapted_sum(weight.base, weight.adapters) - weight.base).detach()
        if weight.base is not weight.registered:
            weight.base = weight.registered.detach()
    weight.forget_values()


def _assert_writable(weight: WeightSum) -> None:
    if isinstance(weight.base, PackedWeight) or any(a.planned.form.rescales for a in weight.adapters):
        raise AdapterCompilerError(
            f"something writes into {weight.site}, whose W is quantized or rescaled by its adapter, so that no W gives "
            f"the result; expected no write; write into adapted.base_weight({weight.site!r}) or exclude the weight"
        )


def _is_in_place(func: Callable[..., Any]) -> bool:
    name = str(getattr(func, "__name__", func))
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _find_view(result: torch.Tensor, tracked: Sequence[tuple[WeightSum, torch.Tensor]]) -> torch.Tensor:
    """The weight if the result is its values, a view if it shares their memory, otherwise the result itself."""
    for weight, total in tracked:
        if result is total:
            return weight
        if type(result) is torch.Tensor and result.layout is torch.strided and _share_memory(result, total):
            return _make_view(result, weight)
    return result


def _make_view(values: torch.Tensor, weight: WeightSum, *, is_whole: bool = False) -> WeightView:
    view = values.as_subclass(WeightView)
    view.weight, view.is_whole = weight, is_whole
    return view


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)
