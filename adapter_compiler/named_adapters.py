"""Several adapters on one model: one is active, the others rest beside it.

A resting adapter keeps its parameters, and its own values of what else training changes in the model: the
fully trained parameters and the persistent buffers. The frozen weights exist once. Switching puts other
adapters into the graphs that there are; nothing is captured anew.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from adapter_compiler.errors import CheckpointError, ConfigError, SiteError
from adapter_compiler.initialisers import prepare_start, start_adapter
from adapter_compiler.store import AdapterStore
from passes.base import make_containers
from passes.plan import AdapterPlan, PlannedAdapter
from passes.sites import AdapterSite, search_known_sites

if TYPE_CHECKING:
    from adapter_compiler.adapted import AdaptedModel
    from adapter_compiler.config import AdapterConfig
    from adapter_compiler.interop.saved_adapters import SavedAdapters

#: Name of the adapter that a model is compiled with.
FIRST_NAME = "default"


class RestingTensors(nn.Module):
    """Values of parameters and buffers of the model that belong to a resting adapter, as buffers of the same names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors."""
        super().__init__()
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = make_containers(self, path)
            owner.register_buffer(leaf, tensor.detach().clone())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The values by name."""
        return dict(self.named_buffers())


class AdapterSet(nn.Module):
    """The adapters of a model but the one called ``default``, by name, and the tensors of those that rest.

    Attributes:
        active: the name of the active adapter.
        plans: the plan of every adapter, ``default`` among them.
        stores: parameters by name, ``default`` apart: the model itself holds that as ``adapters``.
        resting: by name, what resting adapters keep of the model's own tensors.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        """The set of a model that was just compiled with ``plan``."""
        super().__init__()
        self.active = FIRST_NAME
        self.plans = {FIRST_NAME: plan}
        self.stores = nn.Module()
        self.resting = nn.Module()

    def find_resting(self, name: str) -> dict[str, torch.Tensor] | None:
        """What ``name`` keeps of the model's own tensors; ``None`` if it is active and they are in the model."""
        kept = self.resting._modules.get(name)
        return kept.tensors if isinstance(kept, RestingTensors) else None

    def assert_known(self, name: str) -> None:
        """Raise :class:`ConfigError` unless there is an adapter of this name."""
        if name not in self.plans:
            known = ", ".join(map(repr, self.plans))
            raise ConfigError(f"there is no adapter {name!r}, expected one of {known}; add_adapter or load_adapter it")

    def assert_free(self, name: object) -> None:
        """Raise :class:`ConfigError` unless an adapter may be called this."""
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise ConfigError(
                f"{name!r} cannot name an adapter, expected text without '.' and '/'; choose another name, as in 'task'"
            )
        if name in self.plans:
            raise ConfigError(
                f"there is an adapter {name!r} already, expected a new name; choose another or call "
                f"remove_adapter({name!r}) first"
            )


def add_adapter(
    adapted: AdaptedModel, name: str, *, config: AdapterConfig | None = None, plan: AdapterPlan | None = None
) -> None:
    """Add a fresh adapter that rests; see :meth:`AdaptedModel.add_adapter`."""
    from adapter_compiler.compiler import match_plan, plan_adapters

    adapted.adapter_set.assert_free(name)
    config = adapted.options if config is None else config
    if plan is None:
        selection = _with_trainable(config, adapted.options).selection
        plan = plan_adapters(search_known_sites(_known_sites(adapted).values(), adapted.module, selection), config)
    else:
        plan = match_plan(plan, adapted.module)
    if not plan.adapters:
        raise SiteError(
            f"adapter {name!r} would have no site (sites={config.sites!r}), expected at least one; change sites or "
            "exclude in its config"
        )
    plan = prepare_start(plan, config.start)
    store = put_to_rest(adapted, name, plan, find_module_tensors(adapted))
    for adapter in plan:
        weight = adapted.base_weight(adapter.site.weight)
        start_adapter(adapter, store.parameters_of(adapter), weight, config.start)


def use_adapter(adapted: AdaptedModel, name: str) -> None:
    """Make another adapter the active one; see :meth:`AdaptedModel.use`."""
    own = adapted.adapter_set
    own.assert_known(name)
    if name == own.active:
        return
    adapted.adapters.requires_grad_(False)
    live = find_module_tensors(adapted)
    own.resting._modules[own.active] = RestingTensors(live)
    own.active = name
    for adapter in adapted.plan:
        for parameter, tensor in adapted.adapters.parameters_of(adapter).items():
            tensor.requires_grad_(parameter not in adapter.form.frozen)
    write_module_tensors(adapted, own.find_resting(name) or {})
    del own.resting._modules[name]
    adapted.rebuild(adapted.plan)


def remove_adapter(adapted: AdaptedModel, name: str) -> None:
    """Forget a resting adapter; see :meth:`AdaptedModel.remove_adapter`."""
    own = adapted.adapter_set
    own.assert_known(name)
    if name == own.active:
        raise ConfigError(f"adapter {name!r} is active, expected one that rests; call use(...) with another name first")
    del own.plans[name], own.resting._modules[name]
    if name == FIRST_NAME:
        del adapted._modules["adapters"]
    else:
        del own.stores._modules[name]


def load_adapter(adapted: AdaptedModel, name: str, directory: str | Path) -> None:
    """Add an adapter from a folder; see :meth:`AdaptedModel.load_adapter`.

    The adapter keeps the dtype of the file, whatever that of the model is. Tensors that were trained fully get the
    dtypes of those in whose place they come; a cast that would change a value is refused, see
    :func:`adapter_compiler.checkpoint.load_adapters`.
    """
    from adapter_compiler.checkpoint import Snapshot
    from adapter_compiler.interop.saved_adapters import read_saved_adapters

    adapted.adapter_set.assert_free(name)
    saved = read_saved_adapters(directory)
    known, live = _known_sites(adapted), find_module_tensors(adapted)
    values = {site: saved.parameters_of(site) for site in saved.adapters}
    entries = saved.adapters.items()
    planned = [_fit_saved(saved, adapted, entry.planned, known, values[site]) for site, entry in entries]
    replacements = _fit_replacements(saved, live)
    order = {weight: place for place, weight in enumerate(known)}
    ordered = sorted(planned, key=lambda adapter: (order[adapter.site.weight], adapter.site.rows or (0, 0)))
    plan = AdapterPlan(adapters=tuple(ordered))
    by_first_name = {adapter.site.name: own for adapter, own in zip(planned, values.values(), strict=True)}
    before = Snapshot()
    for module in adapted.adapter_set.modules():
        before.add_attributes(module, levels=2)
    with before.put_back_if_it_fails():
        fill_store(put_to_rest(adapted, name, plan, {**live, **replacements}), plan, by_first_name)


def _fit_replacements(saved: SavedAdapters, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was trained fully, in the dtypes and on the devices of the tensors in whose place it comes."""
    from adapter_compiler.checkpoint import cast_exactly

    found = {}
    for key, stored in saved.replacements.items():
        tensor = saved.tensor(stored)
        if key not in live or live[key].shape != tensor.shape:
            mine = "nothing that trains" if key not in live else f"shape {tuple(live[key].shape)}"
            raise CheckpointError(
                f"{saved.path}: {key} of shape {tuple(tensor.shape)} was trained fully, this model has {mine} there; "
                "compile with the same trainable="
            )
        found[key] = cast_exactly(saved.path, key, tensor, live[key].dtype).to(live[key].device)
    return found


def find_module_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """What training changes in the model besides adapters: fully trained parameters and persistent buffers."""
    state = adapted.module.state_dict(keep_vars=True)
    parameters = {name: p for name, p in adapted.module.named_parameters() if p.requires_grad}
    return {**parameters, **{name: b for name, b in adapted.module.named_buffers() if name in state}}


@torch.no_grad()
def write_module_tensors(adapted: AdaptedModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give fully trained parameters and buffers these values; gradients that belong to the old ones go."""
    for name, target in find_module_tensors(adapted).items():
        if name in tensors:
            target.copy_(tensors[name])
            target.grad = None


@torch.no_grad()
def fill_store(store: AdapterStore, plan: AdapterPlan, values: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Give every parameter of a store its value, by site and name."""
    for adapter in plan:
        for key, parameter in store.parameters_of(adapter).items():
            parameter.copy_(values[adapter.site.name][key])


def put_to_rest(
    adapted: AdaptedModel, name: str, plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]
) -> AdapterStore:
    """A new resting adapter of zeros with these values of the model's own tensors; its parameters."""
    own = adapted.adapter_set
    store = AdapterStore(plan, {key: p.device for key, p in adapted.module.named_parameters()})
    store.requires_grad_(False)
    own.plans[name] = plan
    own.stores._modules[name] = store
    own.resting._modules[name] = RestingTensors(tensors)
    return store


def _with_trainable(config: AdapterConfig, compiled: AdapterConfig) -> AdapterConfig:
    """The options with what the whole model trains fully: that is the same for all of its adapters."""
    return dataclasses.replace(config, trainable=compiled.trainable)


def _known_sites(adapted: AdaptedModel) -> dict[str, AdapterSite]:
    """Every weight that can carry an adapter, as a site for all of it, by each of its names, in model order."""
    plans = adapted.adapter_set.plans.values()
    sites = [*adapted.unadapted_sites, *(adapter.site for plan in plans for adapter in plan)]
    found = {site.weight: dataclasses.replace(site, name=site.weight, rows=None) for site in sites}
    ordered = {name: found[name] for name, _ in adapted.module.named_parameters() if name in found}
    return ordered | {alias: site for site in ordered.values() for alias in site.aliases}


def _fit_saved(
    saved: SavedAdapters,
    adapted: AdaptedModel,
    planned: PlannedAdapter,
    known: Mapping[str, AdapterSite],
    values: Mapping[str, torch.Tensor],
) -> PlannedAdapter:
    """A saved adapter planned for this model."""
    wanted = planned.site.name
    site = known.get(planned.site.weight)
    if site is None or adapted.base_weight(site.name).requires_grad:
        raise CheckpointError(
            f"{saved.path}: site {wanted} is no weight of this model that can carry an adapter; it belongs to another "
            "model, or this one trains the weight fully"
        )
    if site.shape != planned.site.shape or site.transposed != planned.site.transposed:
        raise CheckpointError(
            f"{saved.path}: site {wanted} was saved for a weight of shape {planned.site.shape} (stored in×out: "
            f"{planned.site.transposed}), this model has {site.shape} ({site.transposed})"
        )
    dtype = _find_dtype(saved, wanted, values)
    name = site.name + planned.site.name.removeprefix(planned.site.weight)
    site = dataclasses.replace(site, name=name, rows=planned.site.rows)
    fitted = PlannedAdapter(site=site, form=planned.form, rank=planned.rank, scale=planned.scale, dtype=dtype)
    for key, shape in fitted.parameter_shapes.items():
        if key not in values or tuple(values[key].shape) != shape:
            found = tuple(values[key].shape) if key in values else "nothing"
            raise CheckpointError(f"{saved.path}: site {wanted}: {key} has {found}, expected shape {shape}")
    return fitted


def _find_dtype(saved: SavedAdapters, site: str, values: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds what all parameters of a saved adapter are."""
    found = {tensor.dtype for tensor in values.values()}
    if not all(dtype.is_floating_point for dtype in found):
        raise CheckpointError(
            f"{saved.path}: site {site}: its parameters are {', '.join(map(str, found))}, expected floating-point "
            "numbers; save the adapter again"
        )
    return functools.reduce(torch.promote_types, found)
