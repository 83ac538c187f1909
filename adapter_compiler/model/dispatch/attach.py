"""Put adapters at the weights of a model, and take them out of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import nn

from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.config.attach_options import AttachOptions
from adapter_compiler.model.dispatch.classes import AdaptedModule, find_restored_class, make_adapted_class, set_class
from adapter_compiler.model.dispatch.memory import find_frugal_forward
from adapter_compiler.model.dispatch.scope import Token
from adapter_compiler.model.dispatch.slots import SLOTS, HeldAdapter, Slot
from passes.analysis.weight_uses import find_parameter_aliases
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: They choose a fused inference path in C++ by looking at the weights, where gradients are off.
_CHOOSE_BY_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def attach_adapters(
    module: nn.Module, plan: AdapterPlan, adapter_parameters: AdapterParameters, token: Token, options: AttachOptions
) -> None:
    """Let every read of a planned weight give W + ΔW from now on, in place of whatever stood at the weights before.

    Args:
        module: the model; its parameters stay registered as they are.
        plan: the adapters; those of which nothing is left are put nowhere.
        adapter_parameters: holds their parameters.
        token: the model's, for ``disable_adapters``.
        options: how they compute.
    """
    live = plan.live.by_weight
    choosing = _find_choosing(module)
    wanted: dict[nn.Module, dict[str, Slot]] = {}
    for name, first in find_parameter_aliases(module).items():
        if first in live:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            slot = _make_slot(first, live[first], adapter_parameters, token, options, is_choosing=owner in choosing)
            wanted.setdefault(owner, {})[leaf] = slot
    checkpointed = {module.get_submodule(name) for name in options.checkpointed}
    for child in module.modules():
        cls = _find_users_class(child)
        frugal = find_frugal_forward(cls) if options.fused and options.recompute else None
        if child in wanted or child in checkpointed or frugal is not None:
            slots = wanted.get(child, {})
            child.__dict__[SLOTS] = slots  # before the class, so that a thread that reads meanwhile finds them
            made = make_adapted_class(cls, frozenset(slots), is_checkpointed=child in checkpointed, forward=frugal)
            if type(child) is not made:
                set_class(child, made)
        else:
            _restore(child)


def detach_adapters(module: nn.Module) -> None:
    """Make every module of a model an instance of its user's class again."""
    for child in module.modules():
        _restore(child)


def find_slots(module: nn.Module) -> dict[str, Slot]:
    """The adapted weights by each name under which an adapter stands."""
    return {
        f"{path}.{leaf}" if path else leaf: slot
        for path, child in module.named_modules(remove_duplicate=False)
        for leaf, slot in child.__dict__.get(SLOTS, {}).items()
    }


def find_exchanged(holders: Iterable[tuple[nn.Module, str]]) -> frozenset[tuple[int, str]]:
    """The weights in whose place something stands that is no parameter, as inside ``functional_call``."""
    return frozenset([(id(m), leaf) for m, leaf in holders if not isinstance(m._parameters.get(leaf), nn.Parameter)])


def find_adapted_attributes(module: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """Every module that holds an adapted weight, and the weight's name in it."""
    return tuple((child, leaf) for child in module.modules() for leaf in child.__dict__.get(SLOTS, {}))


@dataclasses.dataclass(frozen=True)
class Place:
    """One step on the way from a model to an adapted weight: which module stands under which name.

    Attributes:
        registry: the submodules of the module above.
        key: the name in it.
        module: what stood there when adapters were attached.
        path: its qualified name.
        weight: a weight on this way.
    """

    registry: Mapping[str, nn.Module | None]
    key: str
    module: nn.Module
    path: str
    weight: str

    @property
    def is_unchanged(self) -> bool:
        """Whether the same module stands there now."""
        return self.registry.get(self.key) is self.module


def find_places(module: nn.Module) -> tuple[Place, ...]:
    """Each step on the ways to all adapted weights once."""
    found: dict[str, Place] = {}
    for name, slot in find_slots(module).items():
        parts = name.split(".")[:-1]
        above = module
        for depth, key in enumerate(parts):
            path = ".".join(parts[: depth + 1])
            below = above._modules[key]
            assert below is not None
            found.setdefault(path, Place(above._modules, key, below, path, slot.weight))
            above = below
    return tuple(found.values())


def share_slots(module: nn.Module, memo: dict[int, object]) -> None:
    """Keep a deep copy from copying the adapters' parameters along with the model's."""
    for child in module.modules():
        if (slots := child.__dict__.get(SLOTS)) is not None:
            memo[id(slots)] = slots


def _make_slot(
    weight: str,
    adapters: Sequence[PlannedAdapter],
    adapter_parameters: AdapterParameters,
    token: Token,
    options: AttachOptions,
    *,
    is_choosing: bool,
) -> Slot:
    held = tuple(
        HeldAdapter(planned, adapter_parameters.get_submodule(planned.site.name), tuple(planned.parameter_shapes))
        for planned in adapters
    )
    return Slot(
        token=token,
        weight=weight,
        shape=adapters[0].site.shape,
        adapters=held,
        fused=options.fused,
        recompute=options.fused and options.recompute,
        is_summed_without_grad=is_choosing,
    )


def _find_choosing(module: nn.Module) -> Collection[nn.Module]:
    """Modules inside ones that choose their way by the weights."""
    outer: Iterable[nn.Module] = (child for child in module.modules() if isinstance(child, _CHOOSE_BY_WEIGHTS))
    return {inner for child in outer for inner in child.modules()}


def _find_users_class(module: nn.Module) -> type[nn.Module]:
    return find_restored_class(type(module)) if isinstance(module, AdaptedModule) else type(module)


def _restore(module: nn.Module) -> None:
    if not isinstance(module, AdaptedModule):
        return
    set_class(module, find_restored_class(type(module)))
    module.__dict__.pop(SLOTS, None)
    if isinstance(module, nn.RNNBase):
        with torch.no_grad():
            module._init_flat_weights()
