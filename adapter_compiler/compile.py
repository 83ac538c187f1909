"""The pipeline: copy the model, analyze an example call, find sites, plan, attach adapters."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapters.copies import (
    assert_not_lazy,
    clone_parameter,
    copy_module,
    replace_at,
    share_parameter,
)
from adapter_compiler.adapters.initializers import prepare_start, start_adapter
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.parameters.sharded import assert_whole
from adapter_compiler.adapters.planning import match_plan, plan_adapters, plan_routing
from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.config.attach_options import AttachOptions
from adapter_compiler.config.progress import progress, tell
from adapter_compiler.errors import AdapterCompilerError, CaptureError, ConfigError, SiteError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.capture.weight_use_analysis import analyze_weight_uses
from adapter_compiler.model.parametrized.find import ParametrizedWeight, find_parametrized
from adapter_compiler.model.parametrized.replace import find_flags, replace_by_values
from adapter_compiler.model.quantized.bitsandbytes_models import adopt_bitsandbytes_linears, has_bitsandbytes_linears
from passes.analysis.weight_uses import WeightUse, find_parameter_aliases
from passes.capture.calls import describe_refusal
from passes.capture.module_state import is_without_memory
from passes.compat import pytree
from passes.planning.find_sites import SiteSearch, find_module_sites, find_sites
from passes.planning.plan import AdapterPlan
from passes.planning.site import abbreviate, find_matching_glob

logger = logging.getLogger(__name__)


def compile_with_adapters(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    config: AdapterConfig | None = None,
    plan: AdapterPlan | None = None,
) -> AdaptedModel:
    """Add adapters to a model: AdaLoRA's form, unless ``config.kind`` says otherwise.

    With an example, one call is recorded as a graph, in the model's present training mode, and sites are chosen by
    what the graph does with each weight. Without an example, sites are the weights of ``nn.Linear``,
    ``nn.MultiheadAttention`` and transformers' ``Conv1D``. Calls run the model's own Python, in which every read of an
    adapted weight gives W + ΔW.

    Args:
        model: any module. Its weights, buffers, ``requires_grad`` flags and training mode do not change (unless
            ``config.inplace``). The adapted model shares the storage of its weights.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.
        config: which weights are adapted, and how.
        plan: an existing plan, which may come from a model on the meta device. It replaces the options in ``config``
            that choose weights, ranks, scales and dtypes.

    A model on the meta device gets a plan without memory for its weights: the result reports sites, ranks and sizes,
    and holds the plan.

    Returns:
        A module that is called like ``model``, in which only the adapters and ``config.trainable`` require grad.

    Raises:
        CaptureError: the model itself fails on the example.
        SiteError: no weight can be adapted, a glob or rule matches nothing, or the plan is for another model.
        ConfigError: an argument has the wrong type.
    """
    config = AdapterConfig() if config is None else config
    example = _check_arguments(model, example_args, example_kwargs, config, plan)
    assert_not_lazy(model)
    with progress(f"compile {type(model).__name__}"):
        return _compile(model, example, config, plan)


def _compile(
    model: nn.Module,
    example: tuple[tuple[Any, ...], dict[str, Any]] | None,
    config: AdapterConfig,
    plan: AdapterPlan | None,
) -> AdaptedModel:
    untied = _find_untied(model, config.untie)
    aliases = {**find_parameter_aliases(model), **{name: name for name in untied}}
    flags = {name: p.requires_grad for name, p in model.named_parameters(remove_duplicate=False)}
    trainable = _find_trainable(aliases, config)

    def own_parameter(name: str, parameter: nn.Parameter) -> nn.Parameter:
        if name in trainable:
            return clone_parameter(parameter, requires_grad=True)
        return share_parameter(parameter)

    own = model if config.inplace else copy_module(model, own_parameter)
    for name in untied:
        replace_at(own, name, own_parameter(name, own.get_parameter(name)))
    if has_bitsandbytes_linears(model):
        adopt_bitsandbytes_linears(own, model)
    computed = find_parametrized(own, trainable)
    viewed = own if not computed else copy_module(own, lambda _, parameter: share_parameter(parameter))
    replace_by_values(viewed, computed)
    for name, parameter in own.named_parameters():
        parameter.requires_grad_(name in trainable and parameter.is_floating_point())
    attaching = config.attaching(own)
    if example is None:
        search = find_module_sites(viewed, config.selection)
    else:
        tell("record a call")
        uses = _analyze(viewed, *_on_device_of(own, example), is_recorded=config.capture != "off")
        search = find_sites(uses, viewed, config.selection)
    tell("plan adapters")
    if plan is None:
        planned = plan_routing(plan_adapters(search, config), config, attaching.regions)
    else:
        planned = match_plan(plan, viewed)
    planned = prepare_start(planned, config.start)
    computed = tuple(weight for weight in computed if weight.name in planned.by_weight)
    replace_by_values(own, computed, has_warnings=True)
    adapted = _assemble(own, search, planned, config, {**flags, **find_flags(computed, flags)}, attaching, computed)
    if config.quantize is not None and not is_without_memory(own):
        tell(f"quantize to {config.quantize}")
        adapted.quantize_base(config.quantize)
    return adapted


def _on_device_of(model: nn.Module, example: tuple[Any, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The example; if the model is on the meta device, with its tensors on the meta device."""
    if not is_without_memory(model):
        return example
    moved: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map_only(torch.Tensor, lambda t: t.to("meta"), example)
    return moved


def _analyze(
    own: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], *, is_recorded: bool
) -> dict[str, list[WeightUse]]:
    try:
        return analyze_weight_uses(own, args, kwargs, is_recorded=is_recorded)
    except AdapterCompilerError:
        raise
    except Exception as error:  # the model's own code can raise any exception
        raise CaptureError(describe_refusal(own, args, kwargs, error)) from error


def _assemble(
    own: nn.Module,
    search: SiteSearch,
    plan: AdapterPlan,
    config: AdapterConfig,
    flags: Mapping[str, bool],
    attaching: AttachOptions,
    computed: tuple[ParametrizedWeight, ...],
) -> AdaptedModel:
    if not plan.adapters:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(search.rejected.items())[:8])
        reasons = reasons or "it has no weights of two or more dimensions"
        raise SiteError(
            f"{type(own).__name__} has no weight to adapt (sites={config.sites!r}), expected at least one; "
            f"change sites, exclude or trainable in the AdapterConfig; {reasons}"
        )
    weights = dict(own.named_parameters())
    adapter_parameters = AdapterParameters(plan, {name: weight.device for name, weight in weights.items()})
    for done, adapter in enumerate(plan):
        tell(f"start {adapter.site.name}", done, len(plan))
        start_adapter(adapter, adapter_parameters.parameters_of(adapter), weights[adapter.site.weight], config.start)
    logger.info("%d sites in %s, %d weights without adapter", len(plan), type(own).__name__, len(search.rejected))
    planned = plan.by_weight
    search = dataclasses.replace(
        search, rejected={name: reason for name, reason in search.rejected.items() if name not in planned}
    )
    return AdaptedModel(
        own,
        plan=plan,
        adapter_parameters=adapter_parameters,
        options=config,
        search=search,
        gradient_flags=flags,
        attaching=attaching,
        parametrized=computed,
    )


def _find_untied(model: nn.Module, globs: Sequence[str]) -> list[str]:
    """The further names of tied parameters that ``untie`` selects; each gets a parameter of its own.

    Raises:
        SiteError: a glob matches no such name.
    """
    tied = [name for name, first in find_parameter_aliases(model).items() if name != first]
    for pattern in globs:
        if find_matching_glob(tied, (pattern,)) is None:
            raise SiteError(
                f"untie={pattern!r} matches no further name of a tied parameter, expected a glob that does; correct it "
                f"or leave it out; there are: {abbreviate(tied)}"
            )
    return [name for name in tied if find_matching_glob([name], globs) is not None]


def _find_trainable(aliases: Mapping[str, str], config: AdapterConfig) -> frozenset[str]:
    """The first qualified names of the parameters that ``config.trainable`` selects.

    Raises:
        SiteError: a glob matches no parameter.
    """
    trainable = config.selection.trainable
    for pattern in trainable:
        if find_matching_glob(aliases, (pattern,)) is None:
            raise SiteError(
                f"trainable={pattern!r} matches no parameter, expected a glob that does; correct it or leave it out; "
                f"there are: {abbreviate(list(aliases))}"
            )
    return frozenset(first for name, first in aliases.items() if find_matching_glob([name], trainable))


def _check_arguments(
    model: object, args: Any, kwargs: Any, config: object, plan: object
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The arguments of the example call, or ``None`` if no example was given.

    Raises:
        ConfigError: an argument has the wrong type.
    """
    if not isinstance(model, nn.Module) or isinstance(model, AdaptedModel):
        raise ConfigError(
            f"model is a {type(model).__name__}, expected a torch.nn.Module without adapters; give the model itself "
            "(for an AdaptedModel, the result of fold())"
        )
    assert_whole(
        model,
        "compile_with_adapters",
        "compile the model before it is sharded: with FSDP2 by shard(adapted). Weights that are tensor parallel "
        "(parallelize_module) cannot have adapters",
    )
    if plan is not None and not isinstance(plan, AdapterPlan):
        raise ConfigError(f"plan is a {type(plan).__name__}, expected an AdapterPlan, as AdapterPlan.from_json gives")
    if not isinstance(config, AdapterConfig):
        raise ConfigError(f"config is a {type(config).__name__}, expected options, as in AdapterConfig(rank=8)")
    if isinstance(args, torch.Tensor) or not isinstance(args, Sequence) or isinstance(args, str):
        raise ConfigError(f"example_args is a {type(args).__name__}, expected a tuple of arguments, as in (x,)")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"example_kwargs is a {type(kwargs).__name__}, expected a dict of arguments, as in {{'x': x}}"
        )
    return (tuple(args), dict(kwargs or {})) if args or kwargs else None
