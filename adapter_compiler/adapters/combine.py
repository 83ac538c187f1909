"""Adapters made from others: weighted sums Σ w_i ΔW_i, exact or to a given rank, and mixtures under fixed gates.

ΔW_i = L_i R_i, so the sum is [w_1 L_1, w_2 L_2, …] [R_1; R_2; …], whose rank is the sum of the ranks. Its
truncated singular value decomposition (Eckart-Young) comes from that of a small matrix: with L = Q_L T_L and
Rᵀ = Q_R T_R, L R = Q_L (T_L T_Rᵀ) Q_Rᵀ. No matrix of the weight's size is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.named_adapters import add_inactive, fill_parameters, find_module_tensors
from adapter_compiler.adapters.parameters.factors import factor_triplets
from adapter_compiler.errors import ConfigError
from passes.forms import MixtureForm, RoutedForm, SvdForm
from passes.planning.json_schema import is_finite
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.site import AdapterSite

#: P [out, r], λ [r] multiplied by the scale and by the weight w_i, and Q [r, in].
Triplets = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

#: Gates of the experts of every router, or those of each router by the name of its site.
Gates = Sequence[float] | Mapping[str, Sequence[float]]


def combine_adapters(
    adapted: AdapterState, weights: Mapping[str, float], *, name: str, rank: int | None, tensors_from: str | None
) -> None:
    """Add an inactive adapter with ΔW = Σ w_i ΔW_i; see :meth:`AdaptedModel.combine`.

    Raises:
        ConfigError: a name or weight cannot be used, or an update depends on the frozen weight (DoRA).
    """
    _assert_weights(adapted, weights, rank)
    adapted.adapter_set.assert_free(name)
    tensors = _choose_tensors(adapted, weights, tensors_from)
    planned, values = [], {}
    for site, found in _find_summands(adapted, weights).items():
        joined = _join([_weigh(adapter, parameters, w) for adapter, parameters, w in found])
        combined = _plan_sum([adapter for adapter, _, _ in found], joined, rank)
        planned.append(combined)
        values[site] = _fit(joined, combined)
    plan = AdapterPlan(adapters=tuple(planned))
    fill_parameters(add_inactive(adapted, name, plan, tensors), plan, values)


def compress_triplets(triplets: Triplets, rank: int) -> Triplets:
    """The ``rank`` largest singular triplets of P diag(λ) Q, with orthonormal P and Q and λ in descending order."""
    P, lam, Q = triplets
    left, upper = torch.linalg.qr(P * lam)
    right, lower = torch.linalg.qr(Q.t())
    U, values, Vh = torch.linalg.svd(upper @ lower.t(), full_matrices=False)
    return (left @ U)[:, :rank], values[:rank], (Vh @ right.t())[:rank]


def _find_summands(
    adapted: AdapterState, weights: Mapping[str, float]
) -> dict[str, list[tuple[PlannedAdapter, Mapping[str, torch.Tensor], float]]]:
    """The summands of each site, in model order: adapter, its parameters, and its weight w_i."""
    positions = {name: index for index, (name, _) in enumerate(adapted.module.named_parameters())}
    found: dict[str, list[tuple[PlannedAdapter, Mapping[str, torch.Tensor], float]]] = {}
    for name, weight in weights.items():
        owner = adapted.parameters_of_adapter(name)
        for adapter in adapted.adapter_set.plans[name]:
            _assert_additive(adapter, name)
            found.setdefault(adapter.site.name, []).append((adapter, owner.parameters_of(adapter), float(weight)))

    def order(site: AdapterSite) -> tuple[int, tuple[int, int]]:
        return positions[site.weight], site.rows or (0, 0)

    return dict(sorted(found.items(), key=lambda item: order(item[1][0][0].site)))


def _weigh(adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor], weight: float) -> Triplets:
    P, lam, Q = factor_triplets(adapter, parameters)
    return P, lam * (adapter.scale * weight), Q


def _join(summands: list[Triplets]) -> Triplets:
    P, lam, Q = zip(*summands, strict=True)
    return torch.cat(P, dim=1), torch.cat(lam), torch.cat(Q)


def _plan_sum(adapters: list[PlannedAdapter], joined: Triplets, rank: int | None) -> PlannedAdapter:
    first, total = adapters[0], len(joined[1])
    largest = first.site.largest_rank
    dtype = first.dtype
    for adapter in adapters[1:]:
        dtype = torch.promote_types(dtype, adapter.dtype)
    return PlannedAdapter(
        site=first.site,
        form=SvdForm(),
        rank=min(total, largest, total if rank is None else rank),
        scale=first.scale,
        dtype=dtype,
    )


def _fit(joined: Triplets, planned: PlannedAdapter) -> dict[str, torch.Tensor]:
    """The triplets as parameters of the planned adapter: unchanged if all of them fit, else compressed to its rank."""
    P, lam, Q = joined if len(joined[1]) == planned.rank else compress_triplets(joined, planned.rank)
    return {"P": P, "lam": lam / planned.scale, "Q": Q}


def _choose_tensors(
    adapted: AdapterState, weights: Mapping[str, float], tensors_from: str | None
) -> Mapping[str, torch.Tensor]:
    """The fully trained parameters and buffers of ``tensors_from``, or of any adapter if all have the same values."""
    if tensors_from is not None:
        adapted.adapter_set.assert_known(tensors_from)
        return _tensors_of(adapted, tensors_from)
    first, *others = weights
    chosen = _tensors_of(adapted, first)
    for other in others:
        tensors = _tensors_of(adapted, other)
        if odd := [key for key, tensor in tensors.items() if not torch.equal(tensor, chosen[key])]:
            raise ConfigError(
                f"adapters {first!r} and {other!r} have different values of {odd[0]}, which a sum of updates does not "
                f"determine; expected the adapter to take them from, as in combine(..., tensors_from={first!r})"
            )
    return chosen


def _tensors_of(adapted: AdapterState, name: str) -> dict[str, torch.Tensor]:
    kept = adapted.adapter_set.find_inactive(name)
    return find_module_tensors(adapted) if kept is None else kept


def _assert_weights(adapted: AdapterState, weights: object, rank: object) -> None:
    if not isinstance(weights, Mapping) or not weights:
        raise ConfigError(f"combine({weights!r}): expected weights by adapter, as in {{'a': 0.7, 'b': 0.3}}")
    for name, weight in weights.items():
        adapted.adapter_set.assert_known(name)
        if not is_finite(weight):
            raise ConfigError(f"combine: the weight of {name!r} is {weight!r}, expected a finite number, such as 0.5")
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ConfigError(f"combine(rank={rank!r}): expected an integer of at least 1, or None for the exact sum")


def _assert_additive(adapter: PlannedAdapter, name: str) -> None:
    if adapter.form.is_routed:
        raise ConfigError(
            f"adapter {name!r} has the form {adapter.form.name!r} at {adapter.site.name}, whose update depends on the "
            "call; expected forms whose updates can be added, such as svd and lora; for a mixture under fixed gates, "
            "call fix_routing(gates, name=...) and combine the adapter that it adds"
        )
    if adapter.form.rescales:
        raise ConfigError(
            f"adapter {name!r} has the form {adapter.form.name!r} at {adapter.site.name}, whose update depends on the "
            "frozen weight; expected forms whose updates can be added, such as svd and lora"
        )


def fix_routing(adapted: AdapterState, gates: Gates, *, name: str) -> None:
    """Add an inactive adapter with the update of the active mixture under fixed gates; see ``AdaptedModel``.

    Raises:
        ConfigError: the active adapter is no mixture, the name is not valid or taken, or gates are missing.
    """
    adapted.adapter_set.assert_free(name)
    mixtures = [adapter for adapter in adapted.plan if isinstance(adapter.form, RoutedForm)]
    if not mixtures:
        raise ConfigError(
            f"fix_routing: the adapter {adapted.active_adapter!r} is no mixture and has no mask, "
            "expected one of AdapterConfig(mixture=...) or (token_mask=...); use(...) it first"
        )
    chosen = {adapter.site.name: _find_gates(adapter, gates) for adapter in mixtures}
    adapters = tuple(_fix_form(adapter) for adapter in adapted.plan)
    values = {}
    for adapter in adapted.plan:
        own = {key: p.detach().clone() for key, p in adapted.adapters.parameters_of(adapter).items()}
        if (given := chosen.get(adapter.site.name)) is not None:
            columns = given.to(own.get("lam", own.get("B"))).repeat_interleave(adapter.rank // len(given))
            key = "lam" if "lam" in own else "B"
            own[key] = own[key] * columns
        values[adapter.site.name] = own
    plan = AdapterPlan(adapters=adapters)
    fill_parameters(add_inactive(adapted, name, plan, find_module_tensors(adapted)), plan, values)


def _fix_form(adapter: PlannedAdapter) -> PlannedAdapter:
    form = adapter.form
    return dataclasses.replace(adapter, form=form.inner) if isinstance(form, RoutedForm) else adapter


def _find_gates(adapter: PlannedAdapter, gates: Gates) -> torch.Tensor:
    form = adapter.form
    assert isinstance(form, RoutedForm)
    router = (form.leader if isinstance(form, MixtureForm) else "") or adapter.site.name
    given = gates.get(router) if isinstance(gates, Mapping) else gates
    is_list = isinstance(given, Sequence) and not isinstance(given, str)
    if given is None or not is_list or len(given) != form.groups or not all(map(is_finite, given)):
        raise ConfigError(
            f"fix_routing: the gates of the router at {router} are {given!r}, expected {form.groups} finite numbers, "
            "one for each expert; give a list for all routers, or a dict of lists by the names of their sites"
        )
    return torch.tensor([float(gate) for gate in given], dtype=torch.float64)
