"""Subclasses of users' module classes in which an adapted weight is a property that reads as W + ΔW.

``torch.nn.utils.parametrize`` does the same. Parameters stay registered under their own names: ``named_parameters``,
state dicts, optimizers and ``torch.func.functional_call`` see the plain weights. Only a read of the attribute gives the
sum. Two kinds of modules need more: known layers, which get a faster ``forward``
(:mod:`adapter_compiler.model.dispatch.layers`), and recurrent modules, which keep a list of their weights.
"""

from __future__ import annotations

import contextlib
import copyreg
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from adapter_compiler.errors import ConfigError, SiteError
from adapter_compiler.model.dispatch.layers import find_layer_forward
from adapter_compiler.model.dispatch.scope import reuse_read, same_scope
from adapter_compiler.model.dispatch.slots import SLOTS, Slot, assert_gathered, read_registered
from adapter_compiler.model.dispatch.weights.adapted_weight import (
    AdaptedWeight,
    make_adapted_weight,
    watch,
    watch_with_hooks,
)
from passes.adapt.apply_adapters import BoundAdapter, adapted_sum
from passes.compat import (
    FLAT_WEIGHTS,
    UPDATE_FLAT_WEIGHTS,
    flat_weight_names,
    is_changed_by_user_mode,
    is_in_dispatch_mode,
    is_transformed,
    without_modes,
)
from passes.quantize.packed_weights import is_packed

#: The attribute in which a module keeps the adapted weights that were deleted from it.
_DELETED = "_adapter_compiler_deleted_weights"


class AdaptedModule:
    """The base class of all such subclasses. It hides them from a user's ``__init_subclass__``.

    Attributes:
        users_class: the module's original class.
        made_with: the arguments of :func:`make_adapted_class`: leaves, is_checkpointed, forward.
    """

    users_class: type[nn.Module]
    made_with: tuple[frozenset[str], bool, Callable[..., Any] | None]

    def __init_subclass__(cls) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        """Keep adapters when ``__class__`` is assigned, and take them along when an adapted weight is assigned."""
        if name == "__class__" and not issubclass(value, AdaptedModule):
            leaves, is_checkpointed, _ = type(self).made_with
            set_class(self, make_adapted_class(value, leaves, is_checkpointed=is_checkpointed))
            return
        if not isinstance(value, AdaptedWeight) or not isinstance(value, nn.Parameter):
            super().__setattr__(name, value)
            return
        if value.slot is None:  # nn.Parameter(weight) has made it
            own = nn.Parameter(value.read_values().clone(), requires_grad=value.requires_grad)
            super().__setattr__(name, own)
            return
        slots = {**self.__dict__.get(SLOTS, {}), name: value.slot}
        super().__setattr__(name, value.registered)
        _, is_checkpointed, forward = type(self).made_with
        self.__dict__[SLOTS] = slots
        made = make_adapted_class(
            type(self).users_class, frozenset(slots), is_checkpointed=is_checkpointed, forward=forward
        )
        set_class(self, made)

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse ``nn.DataParallel``, whose replicas would run without the adapters' gradients.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"nn.DataParallel copies {type(self).__name__} without its adapters, expected one process for each device; "
            "use DistributedDataParallel, or shard(adapted)"
        )

    def __delattr__(self, name: str) -> None:
        weight = self.__dict__.get("_parameters", {}).get(name)
        super().__delattr__(name)
        if weight is not None and name in self.__dict__.get(SLOTS, {}):
            self.__dict__.setdefault(_DELETED, {})[name] = weakref.ref(weight)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Register a parameter, as ``nn.Module`` does.

        Raises:
            SiteError: an adapted weight is moved to another name, where its adapter would have no effect.
        """
        for leaf, deleted in self.__dict__.get(_DELETED, {}).items():
            if param is not None and name != leaf and deleted() is param:
                del self.__dict__[_DELETED][leaf]
                super().register_parameter(leaf, param)  # type: ignore[misc]
                raise SiteError(
                    f"{leaf} of {type(self).users_class.__name__} has an adapter and cannot be renamed to {name}; "
                    "expected the same name; rename it before compile_with_adapters, or after fold()"
                )
        super().register_parameter(name, param)  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__ and reduced[1] == (type(self),):  # type: ignore[attr-defined]
            return (_rebuild, (type(self).users_class, *type(self).made_with), *reduced[2:])
        return reduced


def set_class(module: Any, cls: type) -> None:
    """Change the class of a module without :meth:`AdaptedModule.__setattr__`."""
    object.__setattr__(module, "__class__", cls)


_made: weakref.WeakKeyDictionary[type, dict[Any, type]] = weakref.WeakKeyDictionary()


def make_adapted_class(
    cls: type[nn.Module],
    leaves: frozenset[str],
    *,
    is_checkpointed: bool = False,
    forward: Callable[..., Any] | None = None,
) -> type:
    """The subclass of a user's class in which these parameters read as W + ΔW; equal arguments give the same class.

    Args:
        cls: the user's class.
        leaves: names of parameters.
        is_checkpointed: whether a call in training keeps only its inputs and recomputes the rest in backward.
        forward: a ``forward`` to use instead of the class's, or ``None``.
    """
    known = _made.setdefault(cls, {})
    key = (leaves, is_checkpointed, forward)
    if key not in known:
        members: dict[str, Any] = {leaf: _make_property(leaf) for leaf in sorted(leaves)}
        members |= {"users_class": cls, "made_with": (leaves, is_checkpointed, forward)}
        members |= {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        if forward is not None:
            members["forward"] = forward
        if "weight" in leaves and (layer_forward := find_layer_forward(cls)) is not None:
            members["forward"] = layer_forward
        if issubclass(cls, nn.RNNBase) and leaves:
            members[FLAT_WEIGHTS] = property(_read_flat_weights, _ignore_flat_weights)
            members[UPDATE_FLAT_WEIGHTS] = _keep_flat_weights
        if is_checkpointed:
            members["forward"] = _make_checkpointed(members.get("forward", cls.forward))
        known[key] = types.new_class(cls.__name__, (AdaptedModule, cls), {}, lambda names: names.update(members))
    return known[key]


def find_restored_class(cls: type[AdaptedModule]) -> type[nn.Module]:
    """The class without adapters.

    If ``cls`` was derived from an adapted class, as by ``parametrize``, this is a new class derived from the original.
    """
    if "made_with" in vars(cls):
        return cls.users_class
    own = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    bases = [find_restored_class(base) if issubclass(base, AdaptedModule) else base for base in cls.__bases__]
    return types.new_class(cls.__name__, tuple(bases), {}, lambda names: names.update(own))


def _rebuild(
    cls: type[nn.Module], leaves: frozenset[str], is_checkpointed: bool, forward: Callable[..., Any] | None
) -> nn.Module:
    """An empty module of the subclass; pickle and deepcopy then set its attributes."""
    made = make_adapted_class(cls, leaves, is_checkpointed=is_checkpointed, forward=forward)
    module: nn.Module = object.__new__(made)
    return module


def _make_property(leaf: str) -> property:
    def read(module: nn.Module) -> Any:
        weight = read_registered(module, leaf)
        try:
            return read_weight(module, leaf, weight)
        except AttributeError as error:  # an AttributeError would make nn.Module return the plain weight
            raise RuntimeError(f"{leaf} of {type(module).__name__} cannot be read: {error}") from error

    def write(module: nn.Module, value: Any) -> None:
        module.__dict__[leaf] = value

    def delete(module: nn.Module) -> None:
        del module.__dict__[leaf]

    return property(read, write, delete)


def read_weight(module: nn.Module, leaf: str, weight: torch.Tensor | None) -> torch.Tensor | None:
    """The value of the attribute: W + ΔW, or the registered W if the adapters are not visible now.

    Args:
        module: the module.
        leaf: the name of the weight in it.
        weight: the registered W, or a tensor that was assigned to the attribute.
    """
    slot: Slot | None = module.__dict__.get(SLOTS, {}).get(leaf)
    if slot is None or weight is None or leaf not in module._parameters:
        return weight  # a tensor that was assigned to the attribute was computed from W + ΔW
    adapters = slot.bind(module, leaf, weight)
    if adapters is None:
        return weight
    if is_changed_by_user_mode():
        with without_modes():  # then operators on the plain sum are all that the mode sees
            return _sum(slot, weight, adapters)
    is_summed = is_transformed() or (slot.is_summed_without_grad and not _needs_gradient(weight, adapters))
    if is_summed or (not slot.fused and is_in_dispatch_mode()):
        return _sum(slot, weight, adapters)
    made = reuse_read(slot.token, slot.weight, weight, adapters, lambda: _make(slot, weight, adapters))
    if slot.hooks.belong_to(weight):
        watch_with_hooks(made, slot.hooks)
    return made


def _sum(slot: Slot, weight: torch.Tensor, adapters: tuple[BoundAdapter, ...]) -> torch.Tensor:
    assert_gathered(weight, slot.weight)
    total = adapted_sum(weight, adapters)
    if slot.hooks.belong_to(weight) and total.requires_grad:
        total.register_hook(slot.hooks.make_runner(weight))
    return total


def _needs_gradient(weight: torch.Tensor, adapters: tuple[BoundAdapter, ...]) -> bool:
    parameters = [p for adapter in adapters for p in adapter.parameters.values()]
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (weight, *parameters))


def _make(slot: Slot, weight: torch.Tensor, adapters: tuple[BoundAdapter, ...]) -> AdaptedWeight:
    made = make_adapted_weight(weight, adapters, fused=slot.fused, site=slot.weight)
    made.slot = slot
    if not slot.fused and not is_packed(weight):
        watch(made)
    return made


def _read_flat_weights(module: nn.RNNBase) -> list[torch.Tensor | None]:
    return [_sum_at(module, name) if hasattr(module, name) else None for name in flat_weight_names(module)]


def _sum_at(module: nn.RNNBase, name: str) -> torch.Tensor | None:
    weight = read_registered(module, name)
    slot: Slot | None = module.__dict__.get(SLOTS, {}).get(name)
    adapters = None if slot is None or weight is None else slot.bind(module, name, weight)
    if adapters is None or weight is None or slot is None:
        return weight
    with without_modes() if is_changed_by_user_mode() else contextlib.nullcontext():
        return _sum(slot, weight, adapters)


def _ignore_flat_weights(module: nn.RNNBase, weights: list[Any]) -> None:
    """Do nothing, because the list is made at each read."""


def _keep_flat_weights(module: nn.RNNBase) -> None:
    """Do nothing, because the list is made at each read."""


def _make_checkpointed(forward: Any) -> Any:
    def run(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not module.training or not torch.is_grad_enabled():
            return forward(module, *args, **kwargs)
        if torch.compiler.is_compiling():  # the graph has the recomputation in it, with the same adapters
            return checkpoint(forward, module, *args, use_reentrant=False, **kwargs)
        scope = same_scope()
        return checkpoint(forward, module, *args, use_reentrant=False, context_fn=lambda: (scope, scope), **kwargs)

    return run
