"""Choose the adapter of each site: kind, rank, scale and dtype, and its experts and router."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

from torch import nn

from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.config.mixture import Mixture
from adapter_compiler.errors import SiteError
from passes.analysis.weight_uses import find_parameter_aliases
from passes.forms import FORMS, MaskedForm, MixtureForm
from passes.forms.routed import ROUTABLE
from passes.planning.find_sites import SiteSearch
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.rules import AdapterRule
from passes.planning.selection import ALL_LINEAR
from passes.planning.site import AdapterSite, abbreviate

logger = logging.getLogger(__name__)


def plan_adapters(search: SiteSearch, config: AdapterConfig) -> AdapterPlan:
    """An adapter for every site, with the kind, rank and alpha of its rule or of the configuration.

    A site whose smaller dimension is below the rank gets this dimension as its rank. If ``sites="all-linear"`` adapts
    less than half of the weights that could have an adapter, a warning says so.
    """
    _warn_of_few(search, config)
    return AdapterPlan(adapters=tuple(_plan_one(site, search.rules.get(site.name), config) for site in search.sites))


def _warn_of_few(search: SiteSearch, config: AdapterConfig) -> None:
    adapted = {site.weight for site in search.sites}
    count = len(adapted) + len(search.unselected)
    if config.sites == ALL_LINEAR and adapted and 2 * len(adapted) < count:
        logger.warning(
            "sites='all-linear' adapts %d of the %d weights that can have an adapter (not: %s); with an example of a "
            "call, AdapterConfig(sites='auto') adapts convolutions, recurrent layers and small tables as well",
            len(adapted),
            count,
            abbreviate(search.unselected, most=3),
        )


def _plan_one(site: AdapterSite, rule: AdapterRule | None, config: AdapterConfig) -> PlannedAdapter:
    rank = config.rank if rule is None or rule.rank is None else rule.rank
    alpha = config.alpha if rule is None or rule.alpha is None else rule.alpha
    kind = config.kind if rule is None or rule.kind is None else rule.kind
    return PlannedAdapter(
        site=site,
        form=FORMS[kind],
        rank=min(rank, site.largest_rank),
        scale=config.scale_for(alpha, rank),
        dtype=config.dtype_for(site),
    )


def match_plan(plan: AdapterPlan, model: nn.Module) -> AdapterPlan:
    """The plan with the names and dtypes of the weights of ``model``.

    Raises:
        SiteError: the model has no weight of a planned name, or one of another shape or not of floating point.
    """
    aliases, parameters = find_parameter_aliases(model), dict(model.named_parameters())
    adapters = []
    for adapter in plan:
        site = adapter.site
        if site.weight not in aliases:
            raise SiteError(
                f"the plan has an adapter for {site.weight}, which {type(model).__name__} does not have; expected only "
                "weights of the model; plan again for this model"
            )
        first = aliases[site.weight]
        weight = parameters[first]
        if tuple(weight.shape) != site.shape or not weight.is_floating_point():
            raise SiteError(
                f"site {site.name}: the plan expects a floating-point weight of shape {site.shape}, found "
                f"{weight.dtype} of {tuple(weight.shape)}; plan again for this model"
            )
        others = tuple(name for name, own in aliases.items() if own == first != name)
        name = first + site.name.removeprefix(site.weight)
        found = dataclasses.replace(site, name=name, aliases=others, dtype=weight.dtype)
        adapters.append(dataclasses.replace(adapter, site=found))
    return AdapterPlan(adapters=tuple(adapters))


def plan_routing(plan: AdapterPlan, config: AdapterConfig, regions: Sequence[str]) -> AdapterPlan:
    """The plan with a mixture of experts or a mask of tokens at each site, if the configuration has one.

    Args:
        plan: one adapter for each site.
        config: the configuration.
        regions: the qualified names of the blocks of the model.

    Raises:
        SiteError: a weight is used by other operators than products, it is too small for a rank for each expert, its
            rule asks for another kind, or there are no blocks to share routers in.
    """
    if config.token_mask is not None:
        return AdapterPlan(adapters=tuple(_mask(adapter, config.token_mask) for adapter in plan))
    mixture = config.mixture
    if mixture is None:
        return plan
    leaders: dict[str, str] = {}
    adapters = []
    for adapter in plan:
        group = _find_group(adapter, mixture, regions)
        leader = leaders.setdefault(group, adapter.site.name)
        adapters.append(_mix(adapter, mixture, "" if leader == adapter.site.name else leader))
    return AdapterPlan(adapters=tuple(adapters))


def _find_group(adapter: PlannedAdapter, mixture: Mixture, regions: Sequence[str]) -> str:
    """The name of what shares a router: the site, its block, or the whole model."""
    if mixture.router == "shared":
        return ""
    if mixture.router == "site":
        return adapter.site.name
    if "" in regions:
        raise SiteError(
            "Mixture(router='block') found no repeated blocks in the model, expected some; name them by "
            "AdapterConfig(regions=...), or use router='site' or 'shared'"
        )
    inside = [region for region in regions if adapter.site.weight.startswith(f"{region}.")]
    return max(inside, key=len, default=adapter.site.name)


def _mix(adapter: PlannedAdapter, mixture: Mixture, leader: str) -> PlannedAdapter:
    site, k = adapter.site, mixture.experts
    _assert_routable(adapter)
    rank = adapter.rank // k * k
    if not rank:
        raise SiteError(
            f"site {site.name}: its rank is {adapter.rank} (a weight of {site.out_features} × {site.in_features}), "
            f"expected at least 1 for each of {k} experts; raise the rank, use fewer experts, or exclude the site"
        )
    form = MixtureForm(
        adapter.form,
        experts=k,
        top_k=mixture.top_k or 0,
        per_example=mixture.per == "example",
        leader=leader,
    )
    return dataclasses.replace(adapter, form=form, rank=rank)


def _mask(adapter: PlannedAdapter, argument: str) -> PlannedAdapter:
    _assert_routable(adapter)
    return dataclasses.replace(adapter, form=MaskedForm(adapter.form, argument))


def _assert_routable(adapter: PlannedAdapter) -> None:
    site = adapter.site
    if adapter.form.name not in ROUTABLE:
        raise SiteError(
            f"site {site.name} has the form {adapter.form.name!r} by a rule, expected one of "
            f"{', '.join(map(repr, ROUTABLE))} under a router or a mask; change the rule or exclude the site"
        )
    if site.op != "linear" or len(site.shape) != 2:
        raise SiteError(
            f"site {site.name} is a weight of shape {site.shape} for {site.op}, expected a matrix that is used by "
            "matrix products only, because there is no ΔW that another operator could use; exclude the site"
        )
