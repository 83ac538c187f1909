"""Attach adapters to the weights of a model, and detach them."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.config.attach_options import AttachOptions
from adapter_compiler.errors import ConfigError, SiteError
from adapter_compiler.model.dispatch.classes import AdaptedModule, find_restored_class, make_adapted_class, set_class
from adapter_compiler.model.dispatch.hooks import WeightHooks
from adapter_compiler.model.dispatch.layers import is_flattening
from adapter_compiler.model.dispatch.memory import find_memory_efficient_forward
from adapter_compiler.model.dispatch.scope import Token
from adapter_compiler.model.dispatch.slots import SLOTS, AttachedAdapter, Slot
from adapter_compiler.model.dispatch.weights.routed import MASKING, make_masked_forward
from passes.analysis.weight_uses import find_parameter_aliases
from passes.compat import renew_flat_weights
from passes.forms import MaskedForm, MixtureForm
from passes.planning.plan import AdapterPlan, PlannedAdapter

#: Modules that, without gradients, check their weights and may use a fused inference path in C++.
_WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def attach_adapters(
    module: nn.Module, plan: AdapterPlan, adapter_parameters: AdapterParameters, token: Token, options: AttachOptions
) -> None:
    """Make every read of a planned weight give W + ΔW; adapters that were attached before are replaced.

    Args:
        module: the model; its parameters stay registered under their names.
        plan: the adapters; those of rank 0 are not attached.
        adapter_parameters: the parameters of the adapters.
        token: the model's token, for ``disable_adapters``.
        options: how the adapted weights compute.

    Raises:
        ConfigError: ``forward`` has no argument for the mask of the adapters.
        SiteError: a weight is in a module that swaps tokens and examples, and its gates belong to either.
    """
    live = plan.live.by_weight
    has_routed = any(adapter.form.is_routed for adapter in plan.live)
    swapped = _find_inside(module, nn.MultiheadAttention) if has_routed else ()
    leaders = {adapter.form.leader for adapter in plan.live if isinstance(adapter.form, MixtureForm)}
    with_fast_path = _find_inside(module, _WITH_FAST_PATH)
    hooks = {slot.weight: slot.hooks for slot in find_slots(module).values()}
    wanted: dict[nn.Module, dict[str, Slot]] = {}
    for name, first in find_parameter_aliases(module).items():
        if first in live:
            path, _, leaf = name.rpartition(".")
            owner = module.get_submodule(path)
            for adapter in live[first] if owner in swapped else ():
                _assert_routable(adapter, is_followed=adapter.site.name in leaders)
            if has_routed and is_flattening(_find_users_class(owner)):
                _assert_not_flattened(live[first])
            wanted.setdefault(owner, {})[leaf] = _make_slot(
                first,
                live[first],
                adapter_parameters,
                token,
                hooks.setdefault(first, WeightHooks()),
                options,
                has_fast_path=owner in with_fast_path,
                leaders=leaders,
            )
    masks = {a.form.argument for a in plan.live if isinstance(a.form, MaskedForm)}
    checkpointed = {module.get_submodule(name) for name in options.checkpointed}
    for child in module.modules():
        cls = _find_users_class(child)
        forward = find_memory_efficient_forward(cls) if options.fused and options.recompute else None
        if child is module and masks:
            forward = _make_masked_forward(module, cls, masks, token)
        if child in wanted or child in checkpointed or forward is not None:
            slots = wanted.get(child, {})
            child.__dict__[SLOTS] = slots  # set before the class, so that other threads find them when they read
            made = make_adapted_class(cls, frozenset(slots), is_checkpointed=child in checkpointed, forward=forward)
            if type(child) is not made:
                set_class(child, made)
        else:
            _restore(child)


def detach_adapters(module: nn.Module) -> None:
    """Make every module of a model an instance of its original class again."""
    for child in module.modules():
        _restore(child)


def find_slots(module: nn.Module) -> dict[str, Slot]:
    """The slots of all adapted weights, by every qualified name that has one."""
    return {
        f"{path}.{leaf}" if path else leaf: slot
        for path, child in module.named_modules(remove_duplicate=False)
        for leaf, slot in child.__dict__.get(SLOTS, {}).items()
    }


def find_replaced(attributes: Iterable[tuple[nn.Module, str]]) -> frozenset[tuple[int, str]]:
    """The weights that are replaced by plain tensors at present, as inside ``torch.func.functional_call``.

    Args:
        attributes: the adapted weights, as :func:`find_adapted_attributes` returns them.

    Returns:
        The id of the module and the name of the parameter of each replaced weight.
    """
    return frozenset([(id(m), leaf) for m, leaf in attributes if not isinstance(m._parameters.get(leaf), nn.Parameter)])


def find_adapted_attributes(module: nn.Module) -> tuple[tuple[nn.Module, str], ...]:
    """Every module that has an adapted weight, with the weight's name in it."""
    return tuple((child, leaf) for child in module.modules() for leaf in child.__dict__.get(SLOTS, {}))


@dataclasses.dataclass(frozen=True)
class Place:
    """One step on the path from a model to an adapted weight, to notice when a submodule is replaced.

    Attributes:
        registry: the submodules of the parent module by name.
        key: the submodule's name in it.
        module: the submodule when the adapters were attached.
        path: its qualified name.
        weight: the name of an adapted weight in it.
    """

    registry: Mapping[str, nn.Module | None]
    key: str
    module: nn.Module
    path: str
    weight: str

    @property
    def is_unchanged(self) -> bool:
        """Whether the submodule is still the same."""
        return self.registry.get(self.key) is self.module


def find_places(module: nn.Module) -> tuple[Place, ...]:
    """The steps on the paths to all adapted weights, each once."""
    found: dict[str, Place] = {}
    for name, slot in find_slots(module).items():
        parts = name.split(".")[:-1]
        parent = module
        for depth, key in enumerate(parts):
            path = ".".join(parts[: depth + 1])
            child = parent._modules[key]
            assert child is not None
            found.setdefault(path, Place(parent._modules, key, child, path, slot.weight))
            parent = child
    return tuple(found.values())


def share_slots(module: nn.Module, memo: dict[int, object]) -> None:
    """Let a deep copy share the slots, so that it does not copy the adapters' parameters.

    Args:
        module: the model to be copied.
        memo: deepcopy's memo; the slots are added to it.
    """
    for child in module.modules():
        if (slots := child.__dict__.get(SLOTS)) is not None:
            memo[id(slots)] = slots


def _make_slot(
    weight: str,
    adapters: Sequence[PlannedAdapter],
    adapter_parameters: AdapterParameters,
    token: Token,
    hooks: WeightHooks,
    options: AttachOptions,
    *,
    has_fast_path: bool,
    leaders: Collection[str],
) -> Slot:
    is_routed = any(adapter.form.is_routed for adapter in adapters)
    attached = tuple(
        AttachedAdapter(
            planned,
            adapter_parameters.get_submodule(planned.site.name),
            tuple(planned.parameter_shapes),
            routing=token if planned.form.is_routed else None,
            is_followed=planned.site.name in leaders,
        )
        for planned in adapters
    )
    return Slot(
        token=token,
        weight=weight,
        shape=adapters[0].site.shape,
        adapters=attached,
        hooks=hooks,
        fused=options.fused,
        recompute=options.fused and options.recompute,
        is_summed_without_grad=has_fast_path and not is_routed,
        is_routed=is_routed,
    )


def _make_masked_forward(module: nn.Module, cls: type[nn.Module], masks: Collection[str], token: Token) -> Any:
    """The ``forward`` of the whole model, which keeps the mask among its arguments.

    Raises:
        ConfigError: ``forward`` has no argument of this name.
    """
    (argument, *others) = masks
    known = list(inspect.signature(cls.forward).parameters)[1:]
    if others or argument not in known:
        raise ConfigError(
            f"token_mask={argument!r} is no argument of {cls.__name__}.forward; expected one of "
            f"{', '.join(map(repr, known)) or 'none'}; give the model an argument for the mask"
        )
    module.__dict__[MASKING] = token
    return make_masked_forward(cls.forward, argument)


def _assert_routable(adapter: PlannedAdapter, *, is_followed: bool) -> None:
    form = adapter.form
    is_alone = isinstance(form, MixtureForm) and not (form.per_example or form.leader or is_followed)
    if form.is_routed and not is_alone:
        raise SiteError(
            f"site {adapter.site.name} has the form {form.name!r} in an nn.MultiheadAttention, which swaps examples "
            "and tokens inside; expected a router of its own for each token; use Mixture(router='site', per='token'), "
            "or exclude it"
        )


def _assert_not_flattened(adapters: Sequence[PlannedAdapter]) -> None:
    for adapter in adapters:
        form = adapter.form
        if isinstance(form, MaskedForm) or (isinstance(form, MixtureForm) and form.per_example):
            raise SiteError(
                f"site {adapter.site.name} has the form {form.name!r} in a Conv1D of transformers, which joins "
                "examples and tokens to one dimension; expected gates for each token by a router; use "
                "Mixture(per='token'), or exclude it"
            )


def _find_inside(module: nn.Module, classes: Any) -> Collection[nn.Module]:
    """The modules of these classes, and all modules inside them."""
    outer: Iterable[nn.Module] = (child for child in module.modules() if isinstance(child, classes))
    return {inner for child in outer for inner in child.modules()}


def _find_users_class(module: nn.Module) -> type[nn.Module]:
    return find_restored_class(type(module)) if isinstance(module, AdaptedModule) else type(module)


def _restore(module: nn.Module) -> None:
    if not isinstance(module, AdaptedModule):
        return
    set_class(module, find_restored_class(type(module)))
    module.__dict__.pop(SLOTS, None)
    module.__dict__.pop(MASKING, None)
    if isinstance(module, nn.RNNBase):
        renew_flat_weights(module)
