"""The result of an initializer, and how it is written into the parameters of any form."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping

import torch

from adapter_compiler.config.start_options import StartOptions
from passes.forms.dora import MAGNITUDE, measure_rows
from passes.forms.offset import START
from passes.forms.routed import ROUTER
from passes.planning.plan import PlannedAdapter

#: The variance of a router's weights at the start times the number of inputs (Switch Transformer, section 2.4).
_ROUTER_VARIANCE = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StartingFactors:
    """The directions that an adapter starts with, and the size of each.

    Attributes:
        left: [out, r], the source of P or B; ``None`` for LoRA's start: B = 0, or P = 0 with λ = 1.
        right: [r, in], the source of Q or A.
        values: [r], such that ΔW = s · left diag(values) right at the start; ``None`` for ΔW = 0 (B = 0 or λ = 0).
            Where ΔW is not zero, the form may subtract it from the frozen weight (:class:`passes.forms.OffsetForm`).
    """

    left: torch.Tensor | None
    right: torch.Tensor
    values: torch.Tensor | None = None


#: Returns the factors for a weight [out, in], which is given in the adapter's dtype, at least float32.
Draw = Callable[[PlannedAdapter, torch.Tensor, StartOptions], StartingFactors]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Initializer:
    """An initializer that needs no data.

    Attributes:
        draw: returns the factors.
        is_shifted: whether ΔW is not zero at the start, so that the form must keep and subtract its start.
    """

    draw: Draw
    is_shifted: bool = False


def draw_orthonormal(rows: int, columns: int, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """[rows, columns] with orthonormal columns, uniformly distributed, from torch's global generator.

    Needs ``rows >= columns``. It is computed in at least float32, because torch has no QR decomposition in half
    precision.
    """
    normal = torch.empty(rows, columns, dtype=torch.promote_types(dtype, torch.float32), device=device).normal_()
    basis, upper = torch.linalg.qr(normal)
    signs = upper.diagonal().sgn()  # without this, the distribution depends on the signs that the QR routine chooses
    drawn: torch.Tensor = basis * signs
    return drawn.to(dtype)


def widen(weight: torch.Tensor, adapter: PlannedAdapter) -> torch.Tensor:
    """The weight, or a gradient of its shape, as a matrix [out, in] in the adapter's dtype, at least float32."""
    return adapter.site.to_matrix(weight.detach()).to(torch.promote_types(adapter.dtype, torch.float32))


@torch.no_grad()
def write_start(
    adapter: PlannedAdapter,
    parameters: Mapping[str, torch.Tensor],
    weight: torch.Tensor,
    factors: StartingFactors | None,
) -> None:
    """Write the factors into an adapter's parameters, then routers and what derives from factors or the weight.

    Args:
        adapter: the plan for the site; its form must keep the start if ``factors.values`` is not ``None``.
        parameters: the adapter's parameters by name.
        weight: the frozen weight, in its own shape.
        factors: ``None`` for an adapter of rank 0.
    """
    if factors is not None:
        (_write_triplets if "lam" in parameters else _write_product)(parameters, factors)
    for name, parameter in parameters.items():
        if name.endswith(START):
            parameter.copy_(parameters[name.removesuffix(START)])
        elif name == ROUTER:
            parameter.normal_(std=math.sqrt(_ROUTER_VARIANCE / parameter.shape[1]))
        elif name == MAGNITUDE:
            parameter.copy_(measure_rows(adapter.site.to_matrix(weight.detach()).to(parameter.dtype)))


def _write_triplets(parameters: Mapping[str, torch.Tensor], factors: StartingFactors) -> None:
    parameters["Q"].copy_(factors.right)
    if factors.left is None:
        parameters["P"].zero_()
        parameters["lam"].fill_(1)
        return
    parameters["P"].copy_(factors.left)
    if factors.values is None:
        parameters["lam"].zero_()
    else:
        parameters["lam"].copy_(factors.values)


def _write_product(parameters: Mapping[str, torch.Tensor], factors: StartingFactors) -> None:
    """B = left diag(√values) and A = diag(√values) right; without values, B = 0 and A = right."""
    if factors.values is None:
        parameters["B"].zero_()
        parameters["A"].copy_(factors.right)
        return
    assert factors.left is not None
    root = factors.values.sqrt()
    parameters["B"].copy_(factors.left * root)
    parameters["A"].copy_(root.unsqueeze(1) * factors.right)
