"""W + ΔW as a tensor without memory, whose values are computed only when something needs them.

This is what C++ sees: the inside of an ``autograd.Function``, TorchScript and C++ operators reach a tensor through
``__torch_dispatch__`` and get the values. Which Python operators avoid computing the values is decided by the subclass,
:class:`~adapter_compiler.model.dispatch.weights.adapted_weight.AdaptedWeight`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import torch

from adapter_compiler.model.dispatch.scope import find_call_number
from adapter_compiler.model.dispatch.slots import assert_gathered
from adapter_compiler.model.dispatch.weights.history import (
    BoundAdapters,
    compute_sum,
    find_parameters,
    find_version,
    outside_inference_mode,
    written,
)
from passes.compat import WithoutTorchFunction, make_wrapper, pytree
from passes.quantize.packed_weights import PackedWeight

aten = torch.ops.aten

Self = TypeVar("Self", bound="WeightSum")


class Pin:
    """Whether operators must get the values that were computed last, and whether one has written into them."""

    is_active = False
    is_written = False


class WeightSum(torch.Tensor):
    """W + ΔW with the shape and dtype of W and no memory of its own.

    Attributes:
        source: W with its autograd history.
        registered: the parameter or computed weight that W was read from; writes go to it.
        adapters: the adapters with the parameters that they had at the read.
        fused: whether functions with their own backward may be used.
        site: the weight's qualified name, for messages.
        is_transposed: whether this is (W + ΔW)ᵀ.
        is_detached: whether this is a result of ``detach()`` or ``.data``, which is no parameter and has no history.
        is_watched: whether somebody needs the gradient of the whole weight, so that autograd must compute it.
        has_hooks: whether the hooks of the weight run on the gradient of this tensor.
        slot: the :class:`~adapter_compiler.model.dispatch.slots.Slot` of the weight, if the tensor is from a read.
        total: the values that were computed last.
        total_versions: the versions of W and the adapters for which ``total`` is right; views of it refer to the list.
        used_versions: the versions when the values were computed last.
        pin: whether :meth:`read_values` must return ``total``; shared with what ``detach()`` returns meanwhile.
    """

    registered: torch.Tensor
    adapters: BoundAdapters
    fused: bool
    site: str
    is_transposed: bool
    is_detached: bool
    is_watched: bool
    has_hooks: bool = False
    slot: Any = None
    total: torch.Tensor | None
    total_versions: list[Any]
    used_versions: list[Any]
    pin: Pin
    source: torch.Tensor
    _total_key: tuple[Any, ...] | None

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
        is_detached: bool = False,
    ) -> WeightSum:
        """Make the tensor; the arguments become attributes."""
        shape, strides = base.shape, None if isinstance(base, PackedWeight) else base.stride()
        if is_transposed:
            shape = torch.Size((shape[1], shape[0]))
            strides = None if strides is None else (strides[1], strides[0])
        made: WeightSum = make_wrapper(cls, shape, strides=strides, dtype=base.dtype, device=base.device)
        made.source, made.adapters, made.registered = base, adapters, registered
        made.fused, made.site, made.is_transposed, made.is_watched = fused, site, is_transposed, False
        made.is_detached, made.pin, made.used_versions, made.total_versions = is_detached, Pin(), [], []
        made.total = made._total_key = None
        if not is_detached and not is_transposed:
            made._is_param = True  # makes isinstance(weight, nn.Parameter) true, because users' code expects it
        return made

    @property
    def base(self) -> torch.Tensor:
        """W, without history if this weight is detached."""
        return self.source.detach() if self.is_detached else self.source

    def materialize(self) -> torch.Tensor:
        """The values as a plain tensor, whose autograd history leads to the adapters' parameters.

        In a call of the model they are computed once, until W or a parameter changes. Elsewhere they are always
        computed again, because a write through ``.data`` has no version; the former tensor is returned if it has the
        same values, so that all views share its memory.

        Raises:
            SiteError: W is a DTensor.
        """
        assert_gathered(self.base, self.site)
        key = (None if self.slot is None else find_call_number(self.slot.token), *self.find_versions())
        known = self.total if self._total_key == key else None
        is_usable = known is not None and self._can_reuse(known)
        if known is not None and is_usable and (key[0] is not None or torch.equal(known, self._compute([]))):
            return known
        self.used_versions[:], self.total_versions = key[1:], []
        self.total, self._total_key = self._compute(self.total_versions), key
        return self.total

    @torch.no_grad()
    def refresh(self, total: torch.Tensor, versions: list[Any]) -> None:
        """Write the present values into values that were computed at other versions, for views that were kept."""
        now = list(self.find_versions())
        if now != versions and not total.is_inference():
            total.copy_(self._compute(versions))

    def _compute(self, versions: list[Any]) -> torch.Tensor:
        total = compute_sum(self.base, self.adapters, versions)
        return total.t() if self.is_transposed else total

    def _can_reuse(self, total: torch.Tensor) -> bool:
        """Whether values that were computed before have the history that the present mode needs."""
        needs_history = torch.is_grad_enabled() and not self.is_detached and self.needs_gradient()
        is_usable = not total.is_inference() or torch.is_inference_mode_enabled()
        return is_usable and (total.requires_grad or not needs_history)

    def forget_values(self) -> None:
        """Compute the values again at the next :meth:`materialize`."""
        self._total_key = None

    def read_values(self) -> torch.Tensor:
        """The values as a plain tensor without autograd history."""
        with torch.no_grad():
            values = self.total if self.pin.is_active and self.total is not None else self.materialize()
            return values.detach()

    @contextlib.contextmanager
    def pinned(self) -> Iterator[None]:
        """A context in which all operators get the same values, so that writes into them can be noticed."""
        with torch.no_grad():
            self.materialize()
        self.pin.is_active, self.pin.is_written = True, False
        try:
            yield
        finally:
            self.pin.is_active = False

    def find_versions(self) -> tuple[Any, ...]:
        """Values that change when something writes into W or a parameter of an adapter."""
        return (*map(find_version, self._find_operands()), written.count)

    def needs_gradient(self) -> bool:
        """Whether W or a parameter of an adapter requires grad; of a detached weight, whether it does itself."""
        if self.is_detached:
            with WithoutTorchFunction():
                return self.requires_grad
        return any(tensor.requires_grad for tensor in self._find_operands())

    def detached(self: Self) -> Self:
        """The same weight without autograd history."""
        adapters = tuple(
            dataclasses.replace(a, parameters={n: p.detach() for n, p in a.parameters.items()}) for a in self.adapters
        )
        made = self._with(adapters, is_transposed=self.is_transposed, is_detached=True)
        if self.pin.is_active:
            made.total, made.pin = self.total, self.pin
        return made

    def transposed(self: Self) -> Self:
        """The transposed weight."""
        return self._with(self.adapters, is_transposed=not self.is_transposed, is_detached=self.is_detached)

    def _with(self: Self, adapters: BoundAdapters, *, is_transposed: bool, is_detached: bool) -> Self:
        with outside_inference_mode(self.source):
            made: Self = type(self)(
                self.source,
                adapters,
                registered=self.registered,
                fused=self.fused,
                site=self.site,
                is_transposed=is_transposed,
                is_detached=is_detached,
            )
        return made

    def _find_operands(self) -> Iterator[torch.Tensor]:
        yield self.source
        yield from find_parameters(self.adapters)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        values = self.read_values().requires_grad_(self.needs_gradient())
        return f"Parameter containing:\n{values!r}" if isinstance(self, torch.nn.Parameter) else repr(values)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run operators below autograd on the values."""
        kwargs = kwargs or {}
        if func in (aten.detach.default, aten.alias.default):
            made = args[0].detached()
            made.is_watched = True  # autograd may give it a history that only operators on the tensor itself see
            return made
        values = pytree.tree_map_only(WeightSum, WeightSum.read_values, (args, kwargs))
        return cls.run_below_autograd(func, values, (args, kwargs))

    @classmethod
    def run_below_autograd(cls, func: Any, values: Any, arguments: Any) -> Any:
        """Run an operator on the values; a subclass writes changes back.

        Args:
            func: the operator.
            values: its positional and keyword arguments, with values in place of the weights.
            arguments: the same with the weights.
        """
        args, kwargs = values
        return func(*args, **kwargs)
