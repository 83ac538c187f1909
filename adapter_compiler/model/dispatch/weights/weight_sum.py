"""W + ΔW as a tensor without memory, whose values are computed only when something needs them.

This is what C++ sees: the inside of an ``autograd.Function``, TorchScript and C++ operators reach a tensor through
``__torch_dispatch__`` and get the values. Which Python operators avoid computing the values is decided by the subclass,
:class:`~adapter_compiler.model.dispatch.weights.adapted_weight.AdaptedWeight`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from adapter_compiler.model.dispatch.slots import assert_gathered
from passes.adapt.apply_adapters import BoundAdapter, adapted_sum
from passes.compat import make_wrapper, pytree, version_of
from passes.quantize.packed_weights import PackedWeight

aten = torch.ops.aten

Self = TypeVar("Self", bound="WeightSum")

#: The adapters of one weight with their parameters.
BoundAdapters = tuple[BoundAdapter, ...]


class WeightSum(torch.Tensor):
    """W + ΔW with the shape and dtype of W and no memory of its own.

    Attributes:
        base: W.
        registered: the parameter or computed weight that W was read from; writes go to it.
        adapters: the adapters with the parameters that they had at the read.
        fused: whether functions with their own backward may be used.
        site: the weight's qualified name, for messages.
        is_transposed: whether this is (W + ΔW)ᵀ.
        is_watched: whether somebody needs the gradient of the whole weight, so that autograd must compute it.
        slot: the :class:`~adapter_compiler.model.dispatch.slots.Slot` of the weight, if the tensor is from a read.
        total: the values, once they were computed; :meth:`materialize` returns them if they are up to date.
        total_view: ``total`` and the view of it that ``writes.view_values`` returned last.
    """

    base: torch.Tensor
    registered: torch.Tensor
    adapters: BoundAdapters
    fused: bool
    site: str
    is_transposed: bool
    is_watched: bool
    slot: Any = None
    total: torch.Tensor | None
    total_view: tuple[torch.Tensor, torch.Tensor] | None
    _total_key: tuple[Any, ...] | None
    #: Makes ``isinstance(weight, nn.Parameter)`` true, because users' code expects the parameter.
    _is_param = True

    @staticmethod
    def __new__(
        cls,
        base: torch.Tensor,
        adapters: BoundAdapters,
        *,
        registered: torch.Tensor,
        fused: bool,
        site: str,
        is_transposed: bool = False,
    ) -> WeightSum:
        """Make the tensor; the arguments become attributes."""
        shape, strides = base.shape, None if isinstance(base, PackedWeight) else base.stride()
        if is_transposed:
            shape = torch.Size((shape[1], shape[0]))
            strides = None if strides is None else (strides[1], strides[0])
        made: WeightSum = make_wrapper(cls, shape, strides=strides, dtype=base.dtype, device=base.device)
        made.base, made.adapters, made.registered = base, adapters, registered
        made.fused, made.site, made.is_transposed, made.is_watched = fused, site, is_transposed, False
        made.total = made.total_view = made._total_key = None
        return made

    def materialize(self) -> torch.Tensor:
        """The values as a plain tensor, whose autograd history leads to the adapters' parameters.

        They are recomputed only if W, a parameter or the gradient mode has changed.

        Raises:
            SiteError: W is a DTensor.
        """
        assert_gathered(self.base, self.site)
        key = (torch.is_grad_enabled(), *(_find_version(t) for t in self._find_operands()))
        if self.total is None or self._total_key != key:
            total = adapted_sum(self.base, self.adapters)
            self.total, self._total_key = total.t() if self.is_transposed else total, key
        return self.total

    def forget_values(self) -> None:
        """Recompute the values at the next :meth:`materialize`."""
        self._total_key = None

    def read_values(self) -> torch.Tensor:
        """The values as a plain tensor without autograd history."""
        with torch.no_grad():
            return self.materialize().detach()

    def needs_gradient(self) -> bool:
        """Whether W or a parameter of an adapter requires grad."""
        return any(tensor.requires_grad for tensor in self._find_operands())

    def detached(self: Self) -> Self:
        """The same weight without autograd history."""
        adapters = tuple(
            BoundAdapter(a.planned, {n: p.detach() for n, p in a.parameters.items()}) for a in self.adapters
        )
        return self._with(self.base.detach(), adapters, is_transposed=self.is_transposed)

    def transposed(self: Self) -> Self:
        """The transposed weight."""
        return self._with(self.base, self.adapters, is_transposed=not self.is_transposed)

    def _with(self: Self, base: torch.Tensor, adapters: BoundAdapters, *, is_transposed: bool) -> Self:
        made: Self = type(self)(
            base,
            adapters,
            registered=self.registered,
            fused=self.fused,
            site=self.site,
            is_transposed=is_transposed,
        )
        return made

    def _find_operands(self) -> Iterator[torch.Tensor]:
        yield self.base
        for adapter in self.adapters:
            yield from adapter.parameters.values()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Parameter containing:\n{self.materialize()!r}"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run operators below autograd on the values."""
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            return args[0].detached()
        args, kwargs = pytree.tree_map_only(WeightSum, WeightSum.read_values, (args, kwargs))
        return func(*args, **kwargs)


def _find_version(tensor: torch.Tensor) -> Any:
    """A value that differs after each write in place; for an inference tensor, which has no version, at each call."""
    return object() if tensor.is_inference() else version_of(tensor)
