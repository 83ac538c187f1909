"""Write sizes that have one value only as numbers.

    an input of size [s0, s1], where torch.export has found s1 = 12   →   an input of size [s0, 12]

torch.export keeps the symbol of such a size, for example of the hidden size in an LSTM's state. The ONNX exporter then
declares the dimension open, and fails where it needs a number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from passes.base import GraphPass, PassResult


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldConstantSizesPass(GraphPass):
    """Give the example values of inputs numbers for sizes that are constant.

    Contract: the graph is the same; afterwards no symbolic size of an input is a constant.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace the example value of each input that has such a size."""
        inputs = [node for node in graph_module.graph.find_nodes(op="placeholder") if _has_constant_symbol(node)]
        for node in inputs:
            node.meta["val"] = _fold_sizes(node.meta["val"])
        return PassResult(graph_module=graph_module, modified=bool(inputs))


def _has_constant_symbol(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return False
    return any(_is_constant_symbol(size) for size in (*value.shape, *value.stride()))


def _is_constant_symbol(size: int | torch.SymInt) -> bool:
    return isinstance(size, torch.SymInt) and bool(size.node.expr.is_number)


def _fold_sizes(value: torch.Tensor) -> torch.Tensor:
    return value.new_empty_strided(_to_numbers(value.shape), _to_numbers(value.stride()))


def _to_numbers(sizes: Sequence[int | torch.SymInt]) -> list[int | torch.SymInt]:
    return [int(size) if _is_constant_symbol(size) else size for size in sizes]
