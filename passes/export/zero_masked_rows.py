"""Give queries that may attend to nothing the result that PyTorch gives them: zero.

    sdpa(q, k, v, mask)   →   where(any(mask, -1), sdpa(q, k, v, mask), 0)

The exporter adds the least number of the dtype where a boolean mask is false, so that a row without a single true
entry, as left padding has, attends to every key. That result is one of padding, but its keys and values are in the
cache of the next layer, and it differs from PyTorch's. Not rewritten: masks of numbers. The node of the attention keeps
its name.
"""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import GraphModule, Node

from passes.base import GraphPass, PassResult, find_graph_modules

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZeroMaskedRowsPass(GraphPass):
    """Add a ``where`` after every ``scaled_dot_product_attention`` with a boolean mask.

    Contract: the outputs stay the same in PyTorch; a second run finds nothing to do.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite each call."""
        found = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes if _is_open(node)]
        for node in found:
            _zero(node)
        return PassResult(graph_module=graph_module, modified=bool(found))


def _find_mask(node: Node) -> Node | None:
    mask = node.kwargs.get("attn_mask", node.args[3] if len(node.args) > 3 else None)
    return mask if isinstance(mask, Node) and mask.meta["val"].dtype is torch.bool else None


def _is_open(node: Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default or _find_mask(node) is None:
        return False
    return not any(_is_where(user, node) for user in node.users)


def _is_where(user: Node, attention: Node) -> bool:
    return user.target is aten.where.ScalarOther and user.args[1:] == (attention, 0)


def _zero(node: Node) -> None:
    mask = _find_mask(node)
    assert mask is not None
    graph = node.graph
    with graph.inserting_after(node):
        attends = graph.call_function(aten.any.dim, (mask, -1, True))
    with graph.inserting_after(attends):
        chosen = graph.call_function(aten.where.ScalarOther, (attends, node, 0))
    for new in (attends, chosen):
        new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    attends.meta["val"] = aten.any.dim(mask.meta["val"], -1, True)
    chosen.meta["val"] = node.meta["val"]
    node.replace_all_uses_with(chosen, delete_user_cb=lambda user: user is not chosen)
