"""Put packed weights in the place of dense ones, and let products with them unpack again in backward.

    W  (a Parameter of the graph module)                   →   W packed, the same name
    linear(x, W, b), mm, matmul, addmm  with W packed      →   packed_linear(x, W, b)

A packed weight already unpacks wherever an operator reads it; the second rule is for what operators do
on the way (a product with a strided x copies W for a batched product, and would keep that copy for backward).
Refused: packed weights of other shapes than those that they replace. Left alone: uses of parts of a weight, and
products that :class:`~passes.fuse_adapters.FuseAdaptersPass` has fused, which save weights as they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.base import GraphPass, PassResult, PreconditionError
from passes.capture import MODULE_PREFIX
from passes.packed_weights import PackedWeight, set_parameter
from passes.products import match_product


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantiseWeightsPass(GraphPass):
    """Put packed weights into a graph module.

    Contract: the graph stays as it is, the graph module holds none of the dense weights any more, and outputs
    differ by what packing changes of the values. The graph module's own registry is edited; the module that
    the graph was captured from keeps its Parameters.

    Attributes:
        weights: packed Parameters by the first name of the weight.
        aliases: every parameter name → the first name of the same Parameter.
    """

    weights: Mapping[str, nn.Parameter]
    aliases: Mapping[str, str]

    def requires(self, graph_module: GraphModule) -> None:
        """The graph lints, and each weight has the shape of the one that it replaces."""
        super().requires(graph_module)
        for target, packed in self._find(graph_module).items():
            if (found := tuple(graph_module.get_parameter(target).shape)) != tuple(packed.shape):
                raise PreconditionError(
                    f"{target} has shape {found}, the packed weight {tuple(packed.shape)}; pack this model's weight"
                )

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace each Parameter that is not packed yet."""
        found = self._find(graph_module)
        changed = {t: p for t, p in found.items() if graph_module.get_parameter(t) is not p}
        for target, packed in changed.items():
            set_parameter(graph_module, target, packed)
        return PassResult(graph_module=graph_module, modified=bool(changed))

    def ensures(self, graph_module: GraphModule) -> None:
        """Every graph lints and every weight is packed."""
        super().ensures(graph_module)
        for target in self._find(graph_module):
            if not isinstance(graph_module.get_parameter(target), PackedWeight):
                raise ValueError(f"{target} is still dense")

    def _find(self, graph_module: GraphModule) -> dict[str, nn.Parameter]:
        """The packed weight of each ``get_attr`` node's target."""
        found = {}
        for node in graph_module.graph.find_nodes(op="get_attr"):
            name = self.aliases.get(str(node.target).removeprefix(MODULE_PREFIX))
            if name is not None and name in self.weights:
                found[str(node.target)] = self.weights[name]
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class RecomputeWeightsPass(GraphPass):
    """Let every product with a whole packed weight keep the code for backward, and nothing unpacked.

    Contract: outputs and gradients are those of the graph before within rounding; nodes keep their metadata. Only
    the outermost graph and products that read the weight as it is, or transposed, are rewritten.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite the products."""
        products = [node for node in graph_module.graph.nodes if _is_packed_product(graph_module, node)]
        for node in products:
            _rewrite(node)
        return PassResult(graph_module=graph_module, modified=bool(products))

    def ensures(self, graph_module: GraphModule) -> None:
        """Every graph lints and no such product is left."""
        super().ensures(graph_module)
        left = [node for node in graph_module.graph.nodes if _is_packed_product(graph_module, node)]
        if left:
            raise ValueError(f"{left[0].name} still reads a packed weight")


def packed_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """X Wᵀ + b for x [..., in] and W [out, in], packed; forward and backward unpack W, each for itself."""
    return _PackedLinear.apply(x, weight, bias)  # type: ignore[no-any-return,no-untyped-call]


class _PackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.dtypes = x.dtype, None if bias is None else bias.dtype
        return torch.nn.functional.linear(x, weight, bias)

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
