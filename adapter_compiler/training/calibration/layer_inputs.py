"""Observe the inputs of every adapted weight, by watching the operators of a run.

    y = x Wᵀ or x W, with all or some rows of W, in any module   →   x as [rows, in]
    y = x ∗ W, one- or two-dimensional, ungrouped                →   the patches of x as [rows, in]

A weight is recognized by its memory, so it does not matter which module computes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.errors import SiteError
from adapter_compiler.model.adapted_model import AdaptedModel
from passes.capture.module_state import restored_state, without_fast_path
from passes.compat import TorchDispatchMode
from passes.planning.plan import PlannedAdapter

aten = torch.ops.aten

#: Called as ``observe(site, rows)`` with the site's name and its inputs [rows, in].
Observer = Callable[[str, torch.Tensor], None]

#: Matrix products: the positions of x and of the weight among the arguments.
_PRODUCTS = {aten.mm.default: (0, 1), aten.addmm.default: (1, 2)}


def watch_layer_inputs(
    adapted: AdaptedModel, batches: Iterable[Any], call: Callable[[nn.Module, Any], Any], observe: Observer
) -> None:
    """Run the model on each batch, without adapters and gradients, and report the inputs of each adapted weight.

    Args:
        adapted: the model; random states and buffers that the run changes are restored.
        batches: the batches, in the form that ``call`` takes.
        call: ``call(model, batch)`` runs one batch, as a loss function does.
        observe: called at each use of a weight, with the site's name and its inputs [rows, in].

    Raises:
        SiteError: no matrix product or convolution with a weight was seen.
    """
    watch = _WatchProducts(adapted, observe)
    with restored_state(adapted.module), adapted.disable_adapters(), without_fast_path(), torch.no_grad(), watch:
        for batch in batches:
            call(adapted, batch)
    if missing := [name for name in watch.weights if name not in watch.seen]:
        raise SiteError(
            f"site {missing[0]} (one of {len(missing)}): the batches use no matrix product or convolution with the "
            "weight, expected one, whose inputs are needed; exclude the weight (AdapterConfig(exclude=...)) or use "
            "another method"
        )


class _WatchProducts(TorchDispatchMode):
    def __init__(self, adapted: AdaptedModel, observe: Observer) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.weights = {a.site.name: (a, adapted.base_weight(a.site.weight).detach()) for a in adapted.plan}
        self.seen: set[str] = set()
        self._observe = observe
        self._by_storage: dict[int, list[str]] = {}
        for name, (_, weight) in self.weights.items():
            self._by_storage.setdefault(weight.untyped_storage().data_ptr(), []).append(name)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS:
            x, weight = (args[i] for i in _PRODUCTS[func])
            self._match(weight, lambda adapter, own: _is_product(adapter, own, weight), lambda: x)
        elif func is aten.bmm.default and (args[1].stride(0) == 0 or len(args[1]) == 1):
            x, weight = args[0].flatten(0, 1), args[1][0]
            self._match(weight, lambda adapter, own: _is_product(adapter, own, weight), lambda: x)
        elif func is aten.convolution.default and args[8] == 1 and not args[6] and args[0].dim() in (3, 4):
            self._match(args[1], lambda _, own: args[1].shape == own.shape, lambda: _find_patches(args))
        return func(*args, **(kwargs or {}))

    def _match(
        self,
        operand: torch.Tensor,
        fits: Callable[[PlannedAdapter, torch.Tensor], bool],
        read: Callable[[], torch.Tensor],
    ) -> None:
        for name in self._by_storage.get(operand.untyped_storage().data_ptr(), ()):
            adapter, own = self.weights[name]
            within = 0 <= operand.storage_offset() - own.storage_offset() < own.numel()
            if within and fits(adapter, own):
                self.seen.add(name)
                self._observe(name, read())


def _is_product(adapter: PlannedAdapter, own: torch.Tensor, operand: torch.Tensor) -> bool:
    """Whether x times the operand is x Wᵀ, for all or some rows of W, and not x W."""
    if "conv" in adapter.site.op:
        return False
    expected = adapter.site.to_matrix(own).t()
    return operand.shape[0] == expected.shape[0] and operand.stride() == expected.stride()


def _find_patches(args: Sequence[Any]) -> torch.Tensor:
    """The patches of x that a convolution multiplies by its kernel, [rows, in]."""
    x, weight, _, stride, padding, dilation = args[:6]
    kernel = list(weight.shape[2:])
    if x.dim() == 3:
        x, kernel = x.unsqueeze(2), [1, *kernel]
        stride, padding, dilation = [1, *stride], [0, *padding], [1, *dilation]
    patches = torch.nn.functional.unfold(x, *(tuple(sizes) for sizes in (kernel, dilation, padding, stride)))
    return patches.transpose(1, 2).reshape(-1, patches.shape[1])
