"""Let dropout and attention save less for backward; see :mod:`passes.fuse.memory_efficient_ops`.

    dropout(x, p, True)                                  →  memory_efficient_dropout(x, p, True)
    scaled_dot_product_attention(q, k, v, mask, p > 0)   →  memory_efficient_attention(q, k, v, mask, p)

Not rewritten: in-place dropout, and attention without dropout, for which torch has kernels that save no probabilities.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from passes.base import GraphPass, PassResult, find_graph_modules
from passes.fuse.memory_efficient_ops import memory_efficient_attention, memory_efficient_dropout

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEfficientActivationsPass(GraphPass):
    """Replace operators by ones that save less memory for backward.

    Contract: outputs and gradients stay the same within rounding, and a call draws the same random numbers; nodes keep
    their places and arguments.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Replace them in the graph and in the regions inside it."""
        found = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes]
        dropouts = [node for node in found if _is_dropout(node)]
        attentions = [node for node in found if _is_attention_with_dropout(node)]
        for node in dropouts:
            node.target = memory_efficient_dropout
        for node in attentions:
            node.target = memory_efficient_attention
        return PassResult(graph_module=graph_module, modified=bool(dropouts or attentions))


def _is_dropout(node: Node) -> bool:
    return node.target is aten.dropout.default and not node.kwargs and bool(node.args[1]) and node.args[2] is True


def _is_attention_with_dropout(node: Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    p = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
    return isinstance(p, float) and p > 0
