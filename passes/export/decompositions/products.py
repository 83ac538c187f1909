"""Products and distances of matrices that the ONNX exporter has no translation for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

#: Grouped products; the second one is registered by transformers for devices without a kernel.
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")

#: exp(X) = exp(X / 2^s)^(2^s); Taylor's series has a remainder below float64's rounding for norms up to 1.
_SQUARINGS, _DEGREE = 10, 18


def multiply_groups(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Multiply each row of x by the weight of its group.

    Args:
        x: [T, in].
        weight: one matrix per group, [E, in, out].
        offs: the end of each group, [E]: group e ends before row ``offs[e]``.
        bias: added to the result, which is [T, out].
        out_dtype: dtype of the result.

    Returns:
        [T, out]; rows after the last group are zero.

    Raises:
        NotImplementedError: the operands have another layout; this fails the export.
    """
    if offs is None or x.dim() != 2 or weight.dim() != 3:
        raise NotImplementedError(
            f"a grouped product of {x.dim()}-dimensional rows with a {weight.dim()}-dimensional weight cannot be "
            "decomposed; expected a matrix of rows, grouped by offsets over a stack of weights"
        )
    rows = torch.arange(x.shape[0], device=x.device)
    begins = torch.cat([offs.new_zeros(1), offs[:-1]])
    belongs = (rows >= begins[:, None]) & (rows < offs[:, None])
    spread = torch.where(belongs[..., None], x[None], torch.zeros_like(x)[None])
    product = torch.matmul(spread, weight).sum(0)
    product = product if bias is None else product + bias
    return product if out_dtype is None else product.to(out_dtype)


def measure_distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """``torch.cdist``: the p-norm distances [..., I, J] between the rows of a [..., I, K] and of b [..., J, K]."""
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).sum(-1).to(apart.dtype)
    if p == 1:
        return apart.sum(-1)
    if math.isinf(p):
        return apart.amax(-1)
    return apart.square().sum(-1).sqrt() if p == 2 else apart.pow(p).sum(-1).pow(1 / p)


def measure_own_distances(x: Tensor, p: float = 2.0) -> Tensor:
    """The p-norm distances [I (I - 1) / 2] between different rows of x [I, K], for a fixed number of rows."""
    if not isinstance(x.shape[0], int):
        return NotImplemented
    first, second = torch.triu_indices(x.shape[0], x.shape[0], 1, device=x.device)
    return measure_distances(x, x, p)[first, second]


def exponentiate_matrix(x: Tensor) -> Tensor:
    """The exponentials of matrices x [..., N, N] with norms up to about 1000, computed in float64 and cast back.

    By scaling and squaring (Higham 2005) with a fixed number of steps, so that no step depends on values.
    """
    scaled = x.to(torch.float64) / 2**_SQUARINGS
    term = result = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device).expand(x.shape)
    for degree in range(1, _DEGREE + 1):
        term = torch.matmul(term, scaled) / degree
        result = result + term
    for _ in range(_SQUARINGS):
        result = torch.matmul(result, result)
    return result.to(x.dtype)


RULES: Mapping[str, Callable[..., Tensor]] = {
    **dict.fromkeys(_GROUPED, multiply_groups),
    **dict.fromkeys(("aten::cdist", "aten::_cdist_forward"), measure_distances),
    **dict.fromkeys(("aten::pdist", "aten::_pdist_forward"), measure_own_distances),
    **dict.fromkeys(("aten::matrix_exp", "aten::linalg_matrix_exp"), exponentiate_matrix),
}
