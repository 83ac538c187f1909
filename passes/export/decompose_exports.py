"""Write operators that the ONNX exporter has no translation for in terms of those that it has.

    grouped product   y[t] = x[t] @ w[e(t)]      →   Σ_e (x where t belongs to e, else 0) @ w[e]
    histc(x)          counts of equal bins       →   Σ_i [bin(x_i) = b]
    lgamma(x)         ln |Γ(x)|                  →   Stirling's series after a shift, reflected for x < 1/2
    amax(x), amin(x)  over all dimensions        →   max(x), min(x)
    cdist(a, b, p)    distances of rows          →   (Σ_k |a_ik - b_jk|^p)^(1/p)
    _is_all_true(x)   as asserted                →   all(x); the same with any
    exp(X)            of square matrices         →   Taylor's series of X / 2^s, squared s times
    randperm(n)       a random order of 0 … n-1  →   argsort(rand(n))
    multinomial(p, n) draws by weights p         →   the n greatest of log p - log(-log(rand))
    op(number, x)     where op takes two tensors →   op(full(number), x)

A grouped product becomes dense: every expert computes every row, which costs as many products as there are
experts. Sums are over a fixed order, so results differ from the original by rounding only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Graph

from passes.base import find_graph_modules

aten = torch.ops.aten

#: Operators by their names; the second one is what transformers registers where torch has no kernel.
_GROUPED = ("aten::_grouped_mm", "transformers::grouped_mm_fallback")

_SHIFT = 8
#: B_2k / (2k (2k-1)), the coefficients of Stirling's series (Abramowitz and Stegun 6.1.41).
_STIRLING = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188)
#: exp(X) = exp(X / 2^s)^(2^s), with Taylor's series to a degree whose rest is below float64's rounding for norms of 1.
_SQUARINGS, _DEGREE = 10, 18


def decompose_for_export(program: ExportedProgram) -> ExportedProgram:
    """The program without the operators above; the same object if it has none of them."""
    for body in find_graph_modules(program.graph_module):
        _lift_leading_number(body.graph)
    present = {
        node.target
        for body in find_graph_modules(program.graph_module)
        for node in body.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload)
    }
    table = {target: rule for target in present if (rule := _find_rule(target)) is not None}
    return program.run_decompositions(table) if table else program


def _find_rule(target: Any) -> Callable[..., Tensor] | None:
    return _RULES.get(target._schema.name)


def multiply_groups(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Row t of x [T, in] times the weight [E, in, out] of its group; group e ends before row ``offs[e]``.

    Rows behind the last group are zero. Raises NotImplementedError, which fails the export, for other layouts.
    """
    if offs is None or x.dim() != 2 or weight.dim() != 3:
        raise NotImplementedError(
            f"a grouped product of {x.dim()}-dimensional rows with a {weight.dim()}-dimensional weight is not written "
            "out; expected a matrix of rows, grouped by offsets over a stack of weights"
        )
    rows = torch.arange(x.shape[0], device=x.device)
    begins = torch.cat([offs.new_zeros(1), offs[:-1]])
    belongs = (rows >= begins[:, None]) & (rows < offs[:, None])
    spread = torch.where(belongs[..., None], x[None], torch.zeros_like(x)[None])
    product = torch.matmul(spread, weight).sum(0)
    product = product if bias is None else product + bias
    return product if out_dtype is None else product.to(out_dtype)


def count_bins(x: Tensor, bins: int = 100, min: float = 0, max: float = 0) -> Tensor:
    """Counts of ``bins`` equal bins between ``min`` and ``max``; both 0 means the range of x."""
    values = x.flatten()
    low, high = values.new_full((), min), values.new_full((), max)
    if min == max == 0:
        low, high = values.min(), values.max()
    index = torch.floor((values - low) * bins / (high - low)).clamp(max=bins - 1)
    inside = (values >= low) & (values <= high)
    wanted = torch.arange(bins, device=x.device).to(index.dtype)
    hits = (index[:, None] == wanted) & inside[:, None]
    return hits.to(torch.int64).sum(0).to(x.dtype)


def log_gamma(x: Tensor) -> Tensor:
    """The logarithm of |Γ(x)|, computed in float64 and cast back."""
    wide = x.to(torch.float64)
    mirrored = wide < 0.5
    positive = torch.where(mirrored, 1 - wide, wide)
    shifted = positive + _SHIFT
    inverse = 1 / shifted
    series = (shifted - 0.5) * shifted.log() - shifted + 0.5 * math.log(2 * math.pi)
    for power, coefficient in enumerate(_STIRLING):
        series = series + coefficient * inverse.pow(2 * power + 1)
    for step in range(_SHIFT):
        series = series - (positive + step).log()
    reflected = math.log(math.pi) - torch.sin(math.pi * wide).abs().log() - series
    return torch.where(mirrored, reflected, series).to(x.dtype)


def reduce_to_largest(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The greatest value, where no dimension is named."""
    return NotImplemented if dim or keepdim else x.max()


def reduce_to_least(x: Tensor, dim: Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """The least value, where no dimension is named."""
    return NotImplemented if dim or keepdim else x.min()


def measure_distances(a: Tensor, b: Tensor, p: float = 2.0, compute_mode: int | None = None) -> Tensor:
    """The p-norm distances [..., I, J] between the rows of a [..., I, K] and of b [..., J, K]."""
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (apart != 0).sum(-1).to(apart.dtype)
    if p == 1:
        return apart.sum(-1)
    if math.isinf(p):
        return apart.amax(-1)
    return apart.square().sum(-1).sqrt() if p == 2 else apart.pow(p).sum(-1).pow(1 / p)


def holds_all(x: Tensor) -> Tensor:
    """Whether every element is true."""
    return x.all()


def holds_any(x: Tensor) -> Tensor:
    """Whether an element is true."""
    return x.any()


def exponentiate_matrix(x: Tensor) -> Tensor:
    """The exponential of the matrices x [..., N, N] with norms up to about 1000, computed in float64 and cast back.

    Scaling and squaring with a fixed number of steps (Higham 2005), so that no value decides what is computed.
    """
    scaled = x.to(torch.float64) / 2**_SQUARINGS
    term = result = torch.eye(x.shape[-1], dtype=torch.float64, device=x.device).expand(x.shape)
    for degree in range(1, _DEGREE + 1):
        term = torch.matmul(term, scaled) / degree
        result = result + term
    for _ in range(_SQUARINGS):
        result = torch.matmul(result, result)
    return result.to(x.dtype)


def permute_at_random(
    n: int,
    dtype: torch.dtype | None = None,
    layout: torch.layout | None = None,
    device: torch.device | None = None,
    pin_memory: bool | None = None,
) -> Tensor:
    """A random order of 0 … n-1, which is that of n numbers drawn."""
    return torch.rand(n, dtype=torch.float32, device=device).argsort().to(dtype or torch.int64)


def draw_samples(p: Tensor, num_samples: int, replacement: bool = False, generator: Any = None) -> Tensor:
    """Indices [..., n] drawn by weights p [..., K], by the Gumbel-max trick (Kool et al. 2019 without replacement)."""
    if not replacement:
        return (p.log() - torch.log(-torch.log(torch.rand_like(p)))).topk(num_samples, dim=-1).indices
    drawn = torch.rand((*p.shape[:-1], num_samples, p.shape[-1]), dtype=p.dtype, device=p.device)
    return (p.log().unsqueeze(-2) - torch.log(-torch.log(drawn))).argmax(-1)


def _lift_leading_number(graph: Graph) -> None:
    """A number in the place of a first tensor becomes a tensor of no dimensions."""
    for node in list(graph.nodes):
        is_operator = isinstance(node.target, torch._ops.OpOverload) and node.args and isinstance(node.args[0], float)
        if not is_operator or not isinstance(node.target._schema.arguments[0].type, torch.TensorType):
            continue
        with graph.inserting_before(node):
            lifted = graph.call_function(aten.full.default, ([], node.args[0]), {"dtype": node.meta["val"].dtype})
        lifted.meta["val"] = node.meta["val"].new_full((), node.args[0])
        node.args = (lifted, *node.args[1:])


_RULES: Mapping[str, Callable[..., Tensor]] = {
    **dict.fromkeys(_GROUPED, multiply_groups),
    "aten::histc": count_bins,
    "aten::lgamma": log_gamma,
    "aten::amax": reduce_to_largest,
    "aten::amin": reduce_to_least,
    **dict.fromkeys(("aten::cdist", "aten::_cdist_forward"), measure_distances),
    "aten::_is_all_true": holds_all,
    "aten::_is_any_true": holds_any,
    **dict.fromkeys(("aten::matrix_exp", "aten::linalg_matrix_exp"), exponentiate_matrix),
    "aten::multinomial": draw_samples,
    "aten::randperm": permute_at_random,
}
