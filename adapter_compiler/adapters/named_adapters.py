"""Several adapters on one model: one is active, the others are inactive.

An inactive adapter keeps its parameters, and its own values of everything else that training changes in the model: the
fully trained parameters and the persistent buffers. All adapters share one copy of the frozen weights. Switching
changes which adapter the weights read with; it does not analyze the model again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from adapter_compiler.adapters.adapter_set import FIRST_NAME, InactiveTensors
from adapter_compiler.adapters.adapter_state import AdapterState, checksum_buffers
from adapter_compiler.adapters.initializers import prepare_start, start_adapter
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.planning import match_plan, plan_adapters, plan_routing
from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.errors import ConfigError, SiteError
from passes.planning.find_sites import search_known_sites
from passes.planning.plan import AdapterPlan
from passes.planning.site import AdapterSite


def add_adapter(
    adapted: AdapterState, name: str, *, config: AdapterConfig | None = None, plan: AdapterPlan | None = None
) -> None:
    """Add a new inactive adapter; see :meth:`AdaptedModel.add_adapter`.

    Raises:
        ConfigError: the name is not valid or taken.
        SiteError: no weight would get an adapter, or the plan does not fit the model.
    """
    adapted.adapter_set.assert_free(name)
    config = adapted.options if config is None else config
    if plan is None:
        selection = _with_trainable(config, adapted.options).selection
        plan = plan_adapters(search_known_sites(find_known_sites(adapted).values(), adapted.module, selection), config)
        plan = plan_routing(plan, config, config.attaching(adapted.module).regions)
    else:
        plan = match_plan(plan, adapted.module)
    if not plan.adapters:
        raise SiteError(
            f"adapter {name!r} would have no site (sites={config.sites!r}), expected at least one; change sites or "
            "exclude in its config"
        )
    plan = prepare_start(plan, config.start)
    added = add_inactive(adapted, name, plan, find_module_tensors(adapted))
    for adapter in plan:
        weight = adapted.base_weight(adapter.site.weight)
        start_adapter(adapter, added.parameters_of(adapter), weight, config.start)


def use_adapter(adapted: AdapterState, name: str) -> None:
    """Make another adapter the active one; see :meth:`AdaptedModel.use`.

    Raises:
        ConfigError: there is no such adapter.
    """
    own = adapted.adapter_set
    own.assert_known(name)
    if name == own.active:
        return
    adapted.adapters.requires_grad_(False)
    live = find_module_tensors(adapted)
    own.inactive._modules[own.active] = InactiveTensors(live)
    own.active = name
    adapted.adapters.assign_gradient_flags(adapted.plan)
    write_module_tensors(adapted, own.find_inactive(name) or {})
    del own.inactive._modules[name]
    adapted.rebuild(adapted.plan)


def remove_adapter(adapted: AdapterState, name: str) -> None:
    """Remove an inactive adapter; see :meth:`AdaptedModel.remove_adapter`.

    Raises:
        ConfigError: there is no such adapter, or it is the active one.
    """
    own = adapted.adapter_set
    own.assert_known(name)
    if name == own.active:
        raise ConfigError(
            f"adapter {name!r} is active, expected an inactive one; call use(...) with another name first"
        )
    del own.plans[name], own.inactive._modules[name]
    own.initial_plans.pop(name, None)
    if name == FIRST_NAME:
        del adapted._modules["adapters"]
    else:
        del own.added._modules[name]


def find_module_tensors(adapted: AdapterState) -> dict[str, torch.Tensor]:
    """What training changes in the model besides adapters: fully trained parameters and persistent buffers."""
    state = adapted.module.state_dict(keep_vars=True)
    parameters = {name: p for name, p in adapted.module.named_parameters() if p.requires_grad}
    return {**parameters, **{name: b for name, b in adapted.module.named_buffers() if name in state}}


def find_moved_buffers(adapted: AdapterState, name: str | None = None) -> list[str]:
    """The persistent buffers whose values are others than when the model was compiled.

    Args:
        adapted: the model.
        name: as which adapter has them; by default the active one.
    """
    inactive = adapted.adapter_set.find_inactive(adapted.active_adapter if name is None else name) or {}
    tensors = {key: inactive.get(key, tensor) for key, tensor in find_module_tensors(adapted).items()}
    buffers = {key: tensors[key] for key, _ in adapted.module.named_buffers() if key in tensors}
    return [k for k, value in checksum_buffers(buffers.items()).items() if adapted.initial_buffers.get(k) != value]


@torch.no_grad()
def write_module_tensors(adapted: AdapterState, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write these values into fully trained parameters and buffers; gradients of the old values become ``None``."""
    for name, target in find_module_tensors(adapted).items():
        if name in tensors:
            target.copy_(tensors[name])
            target.grad = None


@torch.no_grad()
def fill_parameters(
    adapter_parameters: AdapterParameters, plan: AdapterPlan, values: Mapping[str, Mapping[str, torch.Tensor]]
) -> None:
    """Write values, given by site and parameter name, into every adapter parameter."""
    for adapter in plan:
        for key, parameter in adapter_parameters.parameters_of(adapter).items():
            parameter.copy_(values[adapter.site.name][key])


def add_inactive(
    adapted: AdapterState, name: str, plan: AdapterPlan, tensors: Mapping[str, torch.Tensor]
) -> AdapterParameters:
    """Add an inactive adapter whose parameters are zero.

    Args:
        adapted: the model.
        name: the new adapter's name, which must be free.
        plan: the adapters.
        tensors: the adapter's values of fully trained parameters and buffers.

    Returns:
        The parameters of the new adapter.
    """
    own = adapted.adapter_set
    added = AdapterParameters(plan, {key: p.device for key, p in adapted.module.named_parameters()})
    added.requires_grad_(False)
    own.plans[name] = plan
    own.added._modules[name] = added
    own.inactive._modules[name] = InactiveTensors(tensors)
    return added


def _with_trainable(config: AdapterConfig, compiled: AdapterConfig) -> AdapterConfig:
    """The options with ``trainable`` as compiled, because all adapters of a model train the same parameters fully."""
    return dataclasses.replace(config, trainable=compiled.trainable)


def find_known_sites(adapted: AdapterState) -> dict[str, AdapterSite]:
    """A site for each weight that can have an adapter, for all of its rows, by each of its names, in model order."""
    plans = adapted.adapter_set.plans.values()
    sites = [*adapted.unadapted_sites, *(adapter.site for plan in plans for adapter in plan)]
    found = {site.weight: dataclasses.replace(site, name=site.weight, rows=None) for site in sites}
    ordered = {name: found[name] for name, _ in adapted.module.named_parameters() if name in found}
    return ordered | {alias: site for site in ordered.values() for alias in site.aliases}
