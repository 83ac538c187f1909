"""Choose the adapter of each site: kind, rank, scale and dtype."""

from __future__ import annotations

import dataclasses
import logging

from torch import nn

from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.errors import SiteError
from passes.analysis.weight_uses import find_parameter_aliases
from passes.forms import FORMS
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
