"""An adapter as two factors, ΔW = L R, which include the scale and λ and leave out pruned triplets."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch.nn import functional

from adapter_compiler.errors import ConfigError
from passes.forms import LoraForm, SvdForm
from passes.forms.dora import MAGNITUDE, DoraForm
from passes.forms.offset import START
from passes.planning.plan import AdapterPlan, PlannedAdapter


def factor_update(adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """L [out, r] and R [r, in] with ΔW = L R, in float64 on the CPU.

    The factors of the SVD and LoRA forms are their parameters; an offset (a start that is subtracted) adds further
    columns and rows. ΔW of any other form is decomposed by a singular value decomposition, to its numerical rank. r is
    the live rank, which may be 0. For a form that rescales the sum W + ΔW (DoRA), this is ΔW without the rescaling.

    Args:
        adapter: the plan for the site.
        parameters: the adapter's parameters by name.
    """
    P, lam, Q = factor_triplets(adapter, parameters)
    return P * (lam * adapter.scale), Q


def factor_triplets(
    adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """P [out, r], λ [r] and Q [r, in] with ΔW = s P diag(λ) Q, in float64 on the CPU; see :func:`factor_update`.

    Raises:
        SiteError: the update depends on the call.
    """
    adapter.assert_matrix()
    wide = {name: value.detach().to("cpu", torch.float64) for name, value in parameters.items()}
    wide.pop(MAGNITUDE, None)
    start = {name.removesuffix(START): wide.pop(name) for name in list(wide) if name.endswith(START)}
    P, lam, Q = _factor(adapter, wide)
    if start:
        # The start may have another rank than the adapter has now, so the two are not subtracted but concatenated.
        before = _factor(adapter, start)
        P, lam, Q = torch.cat([P, before[0]], dim=1), torch.cat([lam, -before[1]]), torch.cat([Q, before[2]])
    return P, lam, Q


def assert_additive(plan: AdapterPlan) -> None:
    """Raise :class:`ConfigError` if a site's adapted weight is not the sum of W and a low-rank matrix."""
    for adapter in plan:
        if adapter.form.is_routed:
            raise ConfigError(
                f"site {adapter.site.name} has the form {adapter.form.name!r}, whose update depends on the call; "
                "expected a form that adds one matrix to the weight (svd, lora); for an adapter with fixed gates, call "
                "adapted.fix_routing(gates, name=...); a mixture itself is exported with adapters='merged'"
            )
        if adapter.form.rescales:
            raise ConfigError(
                f"site {adapter.site.name} has the form {adapter.form.name!r}, which rescales the weight; expected a "
                "form that adds a low-rank matrix to it (svd, lora), which a file can take as inputs at run time; "
                "export with adapters='merged'"
            )


def factor_weight(
    adapters: Sequence[PlannedAdapter], parameters_of: Callable[[PlannedAdapter], Mapping[str, torch.Tensor]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """L [rows, r] and R [r, in] for all adapters of one weight together; L is zero in rows that an adapter skips.

    Args:
        adapters: the adapters of one weight.
        parameters_of: returns the parameters of an adapter by name.
    """
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
    core = adapter.form.core
    form = core.inner if isinstance(core, DoraForm) else core
    if type(form) is LoraForm:
        return wide["B"], wide["B"].new_ones(wide["B"].shape[1]), wide["A"]
    if type(form) is SvdForm:
        live = wide["lam"] != 0
        return wide["P"][:, live], wide["lam"][live], wide["Q"][live]
    delta = core.delta(wide, adapter.scale)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    smallest = torch.finfo(torch.float64).eps * max(delta.shape) * values[:1]
    live = values > smallest
    return left[:, live], values[live] / adapter.scale, right[live]
