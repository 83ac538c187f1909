"""Operators that use an adapted weight without computing W + ΔW: the adapter runs on the activations.

    F.linear(x, w), x @ w, x @ w.T, torch.addmm(b, x, w), torch.bmm(x, w)    products
    F.embedding(i, w)                                                        lookup
    conv1d, conv2d, conv3d                                                   convolution

Each handler has the parameters of torch's operator. It returns ``NotImplemented`` for arguments that it does not
support; the operator then runs on the values of W + ΔW.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.functional import linear

from adapter_compiler.model.dispatch.weights.history import BoundAdapters
from adapter_compiler.model.dispatch.weights.routed import route
from adapter_compiler.model.dispatch.weights.weight_sum import WeightSum
from passes.adapt.apply_adapters import adapted_linear, adapted_output
from passes.forms.base import OperatorCall
from passes.fuse.fused_ops import Recomputation
from passes.quantize.packed_weights import PackedWeight
from passes.quantize.recompute_weights import packed_linear

aten = torch.ops.aten


def multiply(
    x: torch.Tensor,
    matrix: torch.Tensor,
    bias: torch.Tensor | None,
    adapters: BoundAdapters,
    *,
    stored_in_out: bool,
    fused: bool,
    recomputation: Recomputation | None = None,
) -> Any:
    """x M'ᵀ + b for a matrix M [out, in], which is the weight or its transpose; M' is M with the adapters.

    Args:
        x: [..., in].
        matrix: M.
        bias: b, [out], or ``None``.
        adapters: the adapters of the weight.
        stored_in_out: whether M is the transpose of the weight.
        fused: whether functions with their own backward may be used.
        recomputation: how backward can recompute x, or ``None`` to keep it.

    Returns:
        The product [..., out], or ``NotImplemented``.
    """
    if x.is_nested:
        return NotImplemented
    (first, *others) = adapters
    if not others and first.planned.site.transposed == stored_in_out and (factors := first.factors) is not None:
        return adapted_linear(x, matrix, bias, first, factors, fused=fused, recomputation=recomputation)
    product = packed_linear if isinstance(matrix, PackedWeight) else linear
    call = OperatorCall(product, (x, matrix, bias))
    adapters = route(adapters, x, is_transposed=stored_in_out)
    weight = matrix.t() if stored_in_out else matrix
    output = adapted_output("product", call, x, weight, adapters, transposed=stored_in_out)
    return NotImplemented if output is None else output


def run_linear(input: Any, weight: Any, bias: Any = None) -> Any:
    """``F.linear``."""
    if isinstance(input, WeightSum) or isinstance(bias, WeightSum) or weight.dim() != 2:
        return NotImplemented
    matrix = weight.base.t() if weight.is_transposed else weight.base
    return multiply(input, matrix, bias, weight.adapters, stored_in_out=weight.is_transposed, fused=weight.fused)


def run_matmul(x: Any, weight: Any) -> Any:
    """``torch.matmul`` and ``torch.mm`` with the weight on the right."""
    if isinstance(x, WeightSum) or not isinstance(weight, WeightSum):
        return NotImplemented
    return _multiply_from_left(x, weight, None) if weight.dim() == 2 else _multiply_stack(x, weight)


def run_reflected_matmul(weight: Any, x: Any) -> Any:
    """``Tensor.__rmatmul__``, which gets the weight first."""
    return run_matmul(x, weight)


def run_bmm(x: Any, weight: Any) -> Any:
    """``torch.bmm`` with the weight on the right."""
    if isinstance(x, WeightSum) or not isinstance(weight, WeightSum):
        return NotImplemented
    return _multiply_stack(x, weight) if len(x) == len(weight) else NotImplemented


def run_addmm(bias: Any, x: Any, weight: Any, **options: Any) -> Any:
    """``torch.addmm`` with a bias [out]."""
    if options or isinstance(bias, WeightSum) or isinstance(x, WeightSum) or bias.dim() != 1:
        return NotImplemented
    return _multiply_from_left(x, weight, bias)


def _multiply_from_left(x: torch.Tensor, weight: WeightSum, bias: torch.Tensor | None) -> Any:
    """x W' + b for a weight [in, out]."""
    matrix = weight.base if weight.is_transposed else weight.base.t()
    return multiply(x, matrix, bias, weight.adapters, stored_in_out=not weight.is_transposed, fused=weight.fused)


def _multiply_stack(x: Any, weight: WeightSum) -> Any:
    """x Wₑ' for each matrix Wₑ of a stack [experts, in, out]."""
    if weight.dim() != 3 or x.dim() < 2:
        return NotImplemented
    target = aten.bmm.default if x.dim() == 3 and len(x) == len(weight) else aten.matmul.default
    call = OperatorCall(target, (x, weight.base))
    output = adapted_output("stack", call, x, weight.base, weight.adapters, transposed=True)
    return NotImplemented if output is None else output


def run_embedding(
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """``F.embedding``; its gradient is dense, whatever ``sparse`` is."""
    if max_norm is not None or scale_grad_by_freq or weight.is_transposed or weight.dim() != 2:
        return NotImplemented
    padding = -1 if padding_idx is None else padding_idx % len(weight)
    call = OperatorCall(aten.embedding.default, (weight.base, input, padding))
    output = adapted_output("lookup", call, input, weight.base, weight.adapters, transposed=False)
    return NotImplemented if output is None else output


def make_convolution(target: Callable[..., torch.Tensor], spatial: int) -> Callable[..., Any]:
    """The handler of a convolution.

    Args:
        target: ``torch.conv1d``, ``torch.conv2d`` or ``torch.conv3d``.
        spatial: its number of spatial dimensions.
    """

    def convolve(
        input: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        if groups != 1 or isinstance(input, WeightSum) or input.dim() != spatial + 2:
            return NotImplemented
        call = OperatorCall(target, (input, weight.base, bias, stride, padding, dilation))
        output = adapted_output("convolution", call, input, weight.base, weight.adapters, transposed=False)
        return NotImplemented if output is None else output

    return convolve
