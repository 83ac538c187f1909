"""Find the sites: the weights that can have an adapter, judged by how they are used.

Each weight of two or more dimensions becomes a site or is rejected with a reason. Nothing is edited here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import nn

from passes.analysis.blocks import find_layer_numbers
from passes.analysis.roles import find_roles
from passes.analysis.weight_uses import GraphUse, WeightUse, find_parameter_aliases
from passes.planning.rules import AdapterRule
from passes.planning.selection import SiteSelection
from passes.planning.site import AdapterSite

_REGISTRIES = {"_parameters", "_buffers", "_modules"}

#: Why a weight has no adapter where there is no graph.
_UNKNOWN = "not the weight of a linear layer; pass an example so that the graph can be searched"

_CONV1D = "transformers.pytorch_utils.Conv1D"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteSearch:
    """The result of a search for sites.

    Attributes:
        sites: the selected weights, in model order.
        rejected: by name, the reason why each other weight of two or more dimensions is not selected.
        rules: by the site's name, the rule that applies to it, if there is one.
        others: weights that can have an adapter and are not selected, in model order.
        unselected: names of the weights that only ``sites`` leaves out, or that cannot be judged without an example.
    """

    sites: tuple[AdapterSite, ...]
    rejected: Mapping[str, str]
    rules: Mapping[str, AdapterRule] = dataclasses.field(default_factory=dict)
    others: tuple[AdapterSite, ...] = ()
    unselected: tuple[str, ...] = ()


def find_sites(
    uses: Mapping[str, Sequence[WeightUse]],
    module: nn.Module,
    selection: SiteSelection,
) -> SiteSearch:
    """The sites of a module, judged by the recorded uses of each weight.

    Args:
        uses: every use of each weight, by its first qualified name.
        module: the owner of the weights; sites have the names of its parameters.
        selection: which weights to select.

    Raises:
        SiteError: a glob of the selection matches no weight.
    """
    roles = find_roles(uses)
    numbers = find_layer_numbers(uses)

    def judge(name: str, weight: nn.Parameter) -> AdapterSite | str:
        verdict = _judge_uses(name, weight, uses.get(name, []))
        if isinstance(verdict, str):
            return verdict
        return dataclasses.replace(verdict, role=roles[name], depth=numbers.get(name))

    return _search(module, selection, judge)


def find_module_sites(module: nn.Module, selection: SiteSelection) -> SiteSearch:
    """The sites of a module, judged by the classes of the modules that own the weights, where there is no graph.

    Known classes are ``nn.Linear``, ``nn.MultiheadAttention`` and transformers' ``Conv1D``.

    Raises:
        SiteError: a glob of the selection matches no weight.
    """
    known = dict(_find_linear_weights(module))

    def judge(name: str, weight: nn.Parameter) -> AdapterSite | str:
        if id(weight) not in known:
            return _UNKNOWN
        if not weight.is_floating_point():
            return f"dtype {weight.dtype} is not a floating-point one"
        return AdapterSite(name=name, shape=tuple(weight.shape), dtype=weight.dtype, transposed=known[id(weight)])

    return _search(module, selection, judge)


def search_known_sites(known: Iterable[AdapterSite], module: nn.Module, selection: SiteSelection) -> SiteSearch:
    """Select again among the sites that an earlier search found.

    Args:
        known: the sites, selected or not.
        module: the owner of the weights; the sites get the present dtypes of its parameters.
        selection: which weights to select.

    Raises:
        SiteError: a glob of the selection matches no weight.
    """
    found = {site.name: site for site in known}

    def judge(name: str, weight: nn.Parameter) -> AdapterSite | str:
        if name not in found:
            return "it could not have an adapter when the model was compiled"
        return dataclasses.replace(found[name], dtype=weight.dtype)

    return _search(module, selection, judge)


def _search(
    module: nn.Module, selection: SiteSelection, judge: Callable[[str, nn.Parameter], AdapterSite | str]
) -> SiteSearch:
    weights = {name: weight for name, weight in module.named_parameters() if weight.dim() >= 2}
    named: dict[str, list[str]] = {name: [] for name in weights}
    for alias, first in find_parameter_aliases(module).items():
        if first in weights:
            named[first].append(alias)
    selection.assert_globs_match([name for names in named.values() for name in names])
    in_attributes = _find_parameters_in_attributes(module)
    rejected: dict[str, str] = {}
    candidates: dict[AdapterSite, str | None] = {}
    rules: dict[str, AdapterRule] = {}
    for name, weight in weights.items():
        names = named[name]
        reason = selection.find_reason_against(names)
        verdict = judge(name, weight) if weight.numel() else "it has no values"
        if isinstance(verdict, str):
            rejected[name] = reason or verdict
            continue
        site = dataclasses.replace(verdict, aliases=tuple(other for other in names if other != name))
        owner = module.get_submodule(name.rpartition(".")[0])
        if attribute := in_attributes.get(id(weight)):
            rejected[name] = reason or f"the attribute {attribute} holds it too, and reads of that miss the adapter"
            continue
        if isinstance(owner, torch.jit.ScriptModule):
            rejected[name] = reason or "it belongs to a TorchScript module, whose C++ code reads the weight directly"
            continue
        rule = None if reason else next((rule for rule in selection.rules if rule.matches(site, owner)), None)
        candidates[site] = reason or selection.find_reason_against_site(site, rule)
        if rule is not None:
            rules[name] = rule
    unselected = [name for name, reason in rejected.items() if reason == _UNKNOWN]
    unselected += [
        s.name for s, reason in candidates.items() if reason is not None and reason == selection.sites_reason(s)
    ]
    for rule in selection.rules:
        rule.assert_decided([name for name, chosen in rules.items() if chosen is rule], list(candidates))
    reasons = {site.name: reason for site, reason in candidates.items() if reason is not None}
    against = {**rejected, **reasons}
    chosen: dict[AdapterSite, AdapterRule | None] = {}
    for site in (site for site in candidates if site.name not in reasons):
        rule = rules.get(site.name)
        chosen |= dict.fromkeys([site] if rule is None else rule.split_site(site), rule)
    return SiteSearch(
        sites=tuple(chosen),
        rejected={name: against[name] for name in weights if name in against},
        rules={site.name: rule for site, rule in chosen.items() if rule is not None},
        others=tuple(site for site in candidates if site.name in reasons),
        unselected=tuple(unselected),
    )


def _find_parameters_in_attributes(module: nn.Module) -> dict[int, str]:
    """By id, the parameters that a plain attribute holds too (also in a list, tuple, set or dict), and its name."""
    found: dict[int, str] = {}
    for name, child in module.named_modules():
        for key, value in vars(child).items():
            if key in _REGISTRIES or key.startswith("_flat_weight"):
                continue
            values = value.values() if isinstance(value, dict) else value
            held = values if isinstance(value, (list, tuple, dict, set)) else (value,)
            found |= {id(one): f"{name}.{key}" if name else key for one in held if isinstance(one, nn.Parameter)}
    return found


def _judge_uses(name: str, weight: nn.Parameter, uses: Sequence[WeightUse]) -> AdapterSite | str:
    """The site for a weight with these uses, or the reason why it cannot have an adapter."""
    if not weight.is_floating_point():
        return f"dtype {weight.dtype} is not a floating-point one"
    if not uses:
        return "the example does not use it; compile with one that does, or without an example, to adapt it"
    if any(use.is_copied for use in uses):
        return "its values are written into another tensor in place, which would not include the adapter"
    if not any(use.reaches_output for use in uses):
        return "no output depends on it"
    if not any(use.reaches_output and use.has_gradient for use in uses):
        return "used under no_grad only, so it gets no gradient"
    other = next((use.op for use in uses if not use.is_linear), None)
    on_activations = [use for use in uses if isinstance(use, GraphUse) and use.activation is not None]
    products = [use for use in on_activations if use.kind == "product"]
    return AdapterSite(
        name=name,
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        transposed=bool(products) and products[0].transposed,
        op=other or "linear",
    )


def _find_linear_weights(module: nn.Module) -> Iterator[tuple[int, bool]]:
    """``(id of the weight, whether it is stored [in, out])`` for linear layers, attention and ``Conv1D``."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            yield id(child.weight), False
        elif isinstance(child, nn.MultiheadAttention):
            for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
                if getattr(child, name) is not None:
                    yield id(getattr(child, name)), False
        elif any(f"{cls.__module__}.{cls.__qualname__}" == _CONV1D for cls in type(child).__mro__):
            yield id(child.weight), True
