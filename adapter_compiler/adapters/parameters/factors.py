"""An adapter as two factors, ΔW = L R, with the scale and λ folded in and pruned triplets left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

from adapter_compiler.errors import ConfigError
from passes.forms.dora import MAGNITUDE
from passes.forms.offset import START
from passes.planning.plan import AdapterPlan, PlannedAdapter


def factor_update(adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """L [out, r] and R [r, in] with ΔW = L R, in float64 on the CPU.

    SVD and LoRA are read off, an offset from the start stands beside them as further columns and rows; any other
    form's ΔW is taken apart by a singular value decomposition, to its numerical rank. r is the number of triplets that
    are alive, which may be 0. Of a form that rescales the sum W + ΔW, only ΔW is given.

    Args:
        adapter: the plan for the site.
        parameters: the adapter's parameters by name, as they are now.
    """
    P, lam, Q = factor_triplets(adapter, parameters)
    return P * (lam * adapter.scale), Q


def factor_triplets(
    adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P [out, r], λ [r] and Q [r, in] with ΔW = s P diag(λ) Q, as in :func:`factor_update`."""
    wide = {name: value.detach().to("cpu", torch.float64) for name, value in parameters.items()}
    wide.pop(MAGNITUDE, None)
    start = {name.removesuffix(START): wide.pop(name) for name in list(wide) if name.endswith(START)}
    P, lam, Q = _factor(adapter, wide)
    if start:
        # The start may have had another rank than is left now.
        before = _factor(adapter, start)
        P, lam, Q = torch.cat([P, before[0]], dim=1), torch.cat([lam, -before[1]]), torch.cat([Q, before[2]])
    return P, lam, Q


def assert_additive(plan: AdapterPlan) -> None:
    """Raise :class:`ConfigError` for a site whose adapted weight is no sum of W and a low-rank matrix."""
    for adapter in plan:
        if adapter.form.rescales:
            raise ConfigError(
                f"site {adapter.site.name} has the form {adapter.form.name!r}, which rescales the weight, so it is no "
                "low-rank addition that a file could take at run time; export with adapters='merged'"
            )


def factor_weight(
    adapters: Sequence[PlannedAdapter], parameters_of: Callable[[PlannedAdapter], Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """L and R for all adapters of a weight together: those of some rows have zeros in the others."""
    lefts, rights = [], []
    for adapter in adapters:
        left, right = factor_update(adapter, parameters_of(adapter))
        first, end = adapter.site.rows or (0, adapter.site.weight_rows)
        lefts.append(functional.pad(left, (0, 0, first, adapter.site.weight_rows - end)))
        rights.append(right)
    return torch.cat(lefts, dim=1), torch.cat(rights)


def _factor(
    adapter: PlannedAdapter, wide: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    if wide.keys() == {"A", "B"}:
        return wide["B"], wide["B"].new_ones(wide["B"].shape[1]), wide["A"]
    if wide.keys() == {"P", "lam", "Q"}:
        live = wide["lam"] != 0
        return wide["P"][:, live], wide["lam"][live], wide["Q"][live]
    delta = adapter.form.core.delta(wide, adapter.scale)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    smallest = torch.finfo(torch.float64).eps * max(delta.shape) * values[:1]
    live = values > smallest
    return left[:, live], values[live] / adapter.scale, right[live]
