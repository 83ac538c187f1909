"""The pipeline: copy the model, capture it, find sites, plan, insert."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.config import AdapterConfig
from adapter_compiler.errors import AdapterCompilerError, CaptureError, ConfigError, SiteError
from adapter_compiler.initialisers import initialise_gaussian
from adapter_compiler.ownership import (
    assert_not_lazy,
    clone_parameter,
    copy_module,
    read_gradient_flags,
    share_parameter,
)
from adapter_compiler.regions import RegionTree, find_boundaries
from adapter_compiler.store import AdapterStore
from passes.calls import describe_refusal, sort_keywords
from passes.forms import SvdForm
from passes.plan import AdapterPlan, PlannedAdapter
from passes.sites import (
    AdapterSite,
    SiteSearch,
    abbreviate,
    find_matching_glob,
    find_module_sites,
    find_sites,
)
from passes.weight_uses import WeightUse, find_parameter_aliases

logger = logging.getLogger(__name__)


def compile_with_adapters(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    config: AdapterConfig | None = None,
) -> AdaptedModel:
    """Insert SVD adapters (AdaLoRA) into a model.

    With an example, the model is captured now, in its present training mode, and sites are found by
    what the graph does with each weight; where it does not capture whole, the largest parts that do
    become graphs, and the Python between them stays. Without one, sites are the weights of linear layers and
    their kin, so that ``trainable_parameters()`` is complete at once, and the first call captures.

    Args:
        model: any module. It keeps its weights, buffers, flags and mode (unless ``config.inplace``);
            the adapted model shares its weights' storage.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.
        config: which weights are adapted, and how.

    Returns:
        A module that is called like ``model``, in which only adapters and ``config.trainable`` train.

    Raises:
        CaptureError: the model itself fails on the example.
        SiteError: nothing can be adapted, or a glob matches nothing.
        ConfigError: the arguments are not of the expected kinds.
    """
    config = AdapterConfig() if config is None else config
    example = _check_arguments(model, example_args, example_kwargs, config)
    assert_not_lazy(model)
    flags = read_gradient_flags(model)
    trainable = _find_trainable(model, config)

    def own_parameter(name: str, parameter: nn.Parameter) -> nn.Parameter:
        if name in trainable:
            return clone_parameter(parameter, requires_grad=True)
        return share_parameter(parameter)

    own = model if config.inplace else copy_module(model, own_parameter)
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(name in trainable and parameter.is_floating_point())
    regions = RegionTree(own, config.context(), find_boundaries(own, config.regions))
    if example is None:
        search = find_module_sites(own, config.selection)
    else:
        search = find_sites(_discover(regions, *example), own, config.selection)
    return _assemble(own, search, config, flags, regions)


def _discover(regions: RegionTree, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[WeightUse]]:
    try:
        return regions.discover(args, kwargs)
    except AdapterCompilerError:
        raise
    except Exception as error:  # the model's own code raises what it likes
        raise CaptureError(describe_refusal(regions.module, args, kwargs, error)) from error


def plan_adapters(sites: Iterable[AdapterSite], config: AdapterConfig) -> AdapterPlan:
    """The same adapter for every site: the SVD form with the configured rank, or as much as fits."""
    return AdapterPlan(
        adapters=tuple(
            PlannedAdapter(
                site=site,
                form=SvdForm(),
                rank=min(config.rank, site.largest_rank),
                scale=config.scale,
                dtype=config.dtype_for(site),
            )
            for site in sites
        )
    )


def _assemble(
    own: nn.Module, search: SiteSearch, config: AdapterConfig, flags: Mapping[str, bool], regions: RegionTree
) -> AdaptedModel:
    if not search.sites:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(search.rejected.items())[:8])
        reasons = reasons or "it has no weights of two or more dimensions"
        raise SiteError(
            f"{type(own).__name__} has no weight to adapt (sites={config.sites!r}), expected at least one; "
            f"change sites, exclude or trainable in the AdapterConfig; {reasons}"
        )
    plan = plan_adapters(search.sites, config)
    store = AdapterStore(plan, {name: p.device for name, p in own.named_parameters()})
    for adapter in plan:
        initialise_gaussian(store.parameters_of(adapter), config.init_std)
    logger.info("%d sites in %s, %d weights without adapter", len(plan), type(own).__name__, len(search.rejected))
    regions.adopt(plan, store)
    return AdaptedModel(
        own, plan=plan, store=store, config=config, search=search, gradient_flags=flags, regions=regions
    )


def _find_trainable(model: nn.Module, config: AdapterConfig) -> frozenset[str]:
    """First qualified names of the parameters that ``config.trainable`` names."""
    aliases, trainable = find_parameter_aliases(model), config.selection.trainable
    for pattern in trainable:
        if find_matching_glob(aliases, (pattern,)) is None:
            raise SiteError(
                f"trainable={pattern!r} matches no parameter, expected a glob that does; mend it or leave it out; "
                f"there are: {abbreviate(list(aliases))}"
            )
    return frozenset(first for name, first in aliases.items() if find_matching_glob([name], trainable))


def _check_arguments(
    model: object, args: Any, kwargs: Any, config: object
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The example call, or ``None`` if none was given."""
    if not isinstance(model, nn.Module) or isinstance(model, AdaptedModel):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module without adapters; give the model itself "
            "(of an AdaptedModel, what fold() returns)"
        )
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"config is a {type(config).__name__}, expected options, as in AdapterConfig(rank=8)")
    if isinstance(args, torch.Tensor) or not isinstance(args, Sequence) or isinstance(args, str):
        raise ConfigError(f"example_args is a {type(args).__name__}, expected a tuple of arguments, as in (x,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"example_kwargs is a {type(kwargs).__name__}, expected a dict of arguments, as in {{'x': x}}"
        )
    return (tuple(args), sort_keywords(kwargs or {})) if args or kwargs else None
