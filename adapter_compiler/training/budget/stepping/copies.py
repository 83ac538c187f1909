"""Mask copies of a model's adapters, such as averaged weights, so that they do not restore pruned triplets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from adapter_compiler.adapters.compact import compact_adapters
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.errors import BudgetError
from adapter_compiler.model.adapted_model import AdaptedModel

#: The dimension of a triplet's parameters that counts triplets.
_RANK_DIMENSIONS = {"lam": -1, "P": -1, "Q": -2}

#: Names of a second set of weights in the state of optimizers: z of schedule-free, the slow weights of lookahead.
_WEIGHTS = ("z", "slow_buffer", "slow_param", "slow_weights")


@torch.no_grad()
def mask_copies(
    module: nn.Module, name: str, pruned: Mapping[str, torch.Tensor], origin: Mapping[str, torch.Tensor]
) -> None:
    """Set λ of pruned triplets to zero in every adapted model inside a module, after compacting it to the same ranks.

    If there is no adapted model in it, this is done in copies of the adapters alone (``adapted.adapters``).

    Args:
        module: an average of the model (``AveragedModel``), a deep copy of it, or a module that contains one.
        name: the adapter's name.
        pruned: by site, the present triplets that are pruned, [r] of bool.
        origin: by site, the index that each present triplet had at the start.

    Raises:
        BudgetError: there is no adapted model in it, or one with other sites or ranks.
    """
    found = [part for part in module.modules() if isinstance(part, AdaptedModel)]
    adapters = [] if found else [part for part in module.modules() if isinstance(part, AdapterParameters)]
    if not found and not adapters:
        raise BudgetError(
            f"apply_mask(module=...) got a {type(module).__name__} without an adapted model in it, expected a copy of "
            "the model that the budget prunes, as in AveragedModel(adapted), or of its adapters, as in "
            "AveragedModel(adapted.adapters)"
        )
    for copy in found:
        _shrink(copy, name, origin)
        _mask(copy.parameters_of_adapter(name), pruned)
    for own in adapters:
        _shrink_adapters(own, origin)
        _mask(own, pruned)


def _mask(adapters: AdapterParameters, pruned: Mapping[str, torch.Tensor]) -> None:
    for site, where in pruned.items():
        lam = adapters.get_submodule(site).get_parameter("lam")
        lam.masked_fill_(where.to(lam.device).view(lam.shape), 0.0)


def _shrink(copy: AdaptedModel, name: str, origin: Mapping[str, torch.Tensor]) -> None:
    if name not in copy.adapter_names or copy.active_adapter != name:
        raise BudgetError(
            f"the copy has the adapter {copy.active_adapter!r} active, expected {name!r}; call use({name!r}) on it"
        )
    kept = _find_kept({adapter.site.name: adapter.rank for adapter in copy.plan}, origin)
    if kept:
        compact_adapters(copy, kept)


def _shrink_adapters(own: AdapterParameters, origin: Mapping[str, torch.Tensor]) -> None:
    parameters = own.keyed_parameters
    kept = _find_kept({site: parameters[site, "lam"].shape[-1] for site in own.prunable_sites}, origin)
    own.resize(
        {
            (site, name): parameters[site, name].index_select(dimension, index.to(parameters[site, name].device))
            for site, index in kept.items()
            for name, dimension in _RANK_DIMENSIONS.items()
        }
    )


def _find_kept(ranks: Mapping[str, int], origin: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The triplets to keep in a copy of these ranks, by site; only sites whose rank is another."""
    kept = {}
    for site, indices in origin.items():
        rank = ranks.get(site)
        if rank == len(indices):
            continue
        if rank is None or (len(indices) and rank <= int(indices.max())):
            raise BudgetError(
                f"site {site}: the copy has {'no adapter' if rank is None else f'rank {rank}'}, expected rank "
                f"{len(indices)} as in the model, or that of the start; make the copy from the model again"
            )
        kept[site] = indices.cpu()
    return kept


@torch.no_grad()
def mask_second_weights(
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Mapping[str, nn.Parameter],
    pruned: Mapping[str, torch.Tensor],
) -> None:
    """Set λ of pruned triplets to zero in a second set of weights that an optimizer keeps in its state."""
    for site, parameter in parameters.items():
        for tensor in _find_second_weights(optimizers, parameter):
            tensor.masked_fill_(pruned[site].to(tensor.device).view(tensor.shape), 0.0)


def _find_second_weights(
    optimizers: Sequence[torch.optim.Optimizer], parameter: nn.Parameter
) -> Iterator[torch.Tensor]:
    for optimizer in optimizers:
        state = optimizer.state.get(parameter, {}) if hasattr(optimizer, "state") else {}
        yield from (state[key] for key in _WEIGHTS if isinstance(state.get(key), torch.Tensor))
