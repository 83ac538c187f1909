"""Dequantize packed weights again in backward, instead of saving their dequantized values.

    linear(x, W, b), mm, matmul, addmm  with W packed      →   packed_linear(x, W, b)

Plain operators dequantize a packed weight too, but some save a dequantized copy: a product with a strided x copies W
for a batched product and keeps the copy for backward. Not rewritten: uses of parts of a weight, and products that
:class:`~passes.fuse.fuse_adapters.FuseAdaptersPass` has fused, which save packed weights anyway.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.nn.functional import linear

from passes.base import GraphPass, PassResult
from passes.operators import match_product
from passes.quantize.packed_weights import PackedWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecomputeWeightsPass(GraphPass):
    """Let every product with a whole packed weight save only the quantized code for backward.

    Contract: outputs and gradients stay the same within rounding; nodes keep their metadata. Only products in the
    outermost graph that read the weight directly are rewritten.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite the products."""
        products = [node for node in graph_module.graph.nodes if _is_packed_product(graph_module, node)]
        for node in products:
            _rewrite(node)
        return PassResult(graph_module=graph_module, modified=bool(products))

    def ensures(self, graph_module: GraphModule) -> None:
        """Raise an error unless every graph lints and no such product is left."""
        super().ensures(graph_module)
        left = [node for node in graph_module.graph.nodes if _is_packed_product(graph_module, node)]
        if left:
            raise ValueError(f"{left[0].name} still reads a packed weight")


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x Wᵀ + b for x [..., in] and a packed W [out, in]; forward and backward each dequantize W."""
    return _PackedLinear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        of_x, of_bias = ctx.dtypes
        dx = (gradient @ weight.to(gradient.dtype)).to(of_x) if ctx.needs_input_grad[0] else None
        dbias = gradient.reshape(-1, gradient.shape[-1]).sum(0).to(of_bias) if ctx.needs_input_grad[2] else None
        return dx, None, dbias


def _is_packed_product(owner: GraphModule, node: Node) -> bool:
    product = match_product(node)
    if product is None or not isinstance(product.x, Node):
        return False
    weight = product.weight
    return weight.op == "get_attr" and isinstance(_look_up(owner, str(weight.target)), PackedWeight)


def _look_up(owner: nn.Module, target: str) -> object:
    path, _, leaf = target.rpartition(".")
    return getattr(owner.get_submodule(path), leaf, None)


def _rewrite(node: Node) -> None:
    product = match_product(node)
    assert product is not None and isinstance(product.x, Node)
    graph, weight = node.graph, product.weight
    with graph.inserting_before(node):
        if product.is_transposed:
            weight = graph.call_function(torch.ops.aten.t.default, (weight,))
        replacement = graph.call_function(packed_linear, (product.x, weight, product.bias))
    replacement.meta.update(node.meta)
    node.replace_all_uses_with(replacement)
    graph.erase_node(node)
