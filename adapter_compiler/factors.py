"""An adapter as two factors, ΔW = L R, with the scale and λ folded in and pruned triplets left out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from passes.plan import PlannedAdapter


def factor_update(adapter: PlannedAdapter, parameters: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """L [out, r] and R [r, in] with ΔW = L R, in float64 on the CPU.

    The SVD form is read off; any other form's ΔW is taken apart by a singular value decomposition, to its
    numerical rank. r is the number of triplets that are alive, which may be 0.

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
    if adapter.form.name == "svd" and wide.keys() == {"P", "lam", "Q"}:
        live = wide["lam"] != 0
        return wide["P"][:, live], wide["lam"][live], wide["Q"][live]
    delta = adapter.form.delta(wide, adapter.scale)
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    smallest = torch.finfo(torch.float64).eps * max(delta.shape) * values[:1]
    live = values > smallest
    return left[:, live], values[live] / adapter.scale, right[live]
