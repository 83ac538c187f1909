"""Reshape the operands of attention to four dimensions, which the ONNX exporter can translate.

    sdpa(q, k, v)  with q [L, E] or [B, L, E]      →   squeeze(sdpa(unsqueeze(q), …))
    sdpa(q, k, v)  with q [A, B, …, H, L, E]       →   unflatten(sdpa(flatten(q), …))

Dimensions are added at the front, so a mask that broadcasts from the right does not change; a mask with more than
three dimensions is expanded and flattened like the query. Not rewritten: operands of unequal rank. The node keeps its
name, so that outputs keep theirs.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.fx import GraphModule, Node

from passes.base import GraphPass, PassResult, find_graph_modules

aten = torch.ops.aten

_RANK = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class LiftAttentionPass(GraphPass):
    """Rewrite every ``scaled_dot_product_attention`` to operands of four dimensions.

    Contract: the outputs stay the same; afterwards every such call with operands of equal rank has four dimensions.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        """Rewrite each call."""
        found = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes if _is_liftable(node)]
        for node in found:
            _lift(node)
        return PassResult(graph_module=graph_module, modified=bool(found))


def _is_liftable(node: Node) -> bool:
    if node.target is not aten.scaled_dot_product_attention.default:
        return False
    ranks = {operand.meta["val"].dim() for operand in map(node.args.__getitem__, range(3))}  # type: ignore[union-attr]
    return len(ranks) == 1 and ranks != {_RANK}


def _lift(node: Node) -> None:
    query, key, value = (node.args[i] for i in range(3))
    mask, *others = node.args[3:] or (None,)
    missing = _RANK - query.meta["val"].dim()  # type: ignore[union-attr]
    with node.graph.inserting_before(node):
        if missing < 0:
            mask = _flatten_mask(node, mask, query, -missing)
        operands = [_reshape(node, operand, missing) for operand in (query, key, value)]
        attention = _emit(node, node.target, *operands, mask, *others, **node.kwargs)
        lead = [_emit(node, aten.sym_size.int, query, i) for i in range(1 - missing)]
        target, args = (aten.unflatten.int, (attention, 0, lead))
        if missing > 0:
            squeezed = attention if missing == 1 else _emit(node, aten.squeeze.dim, attention, 0)
            target, args = aten.squeeze.dim, (squeezed, 0)  # type: ignore[assignment]
    node.target, node.args, node.kwargs = target, args, {}


def _reshape(node: Node, operand: Any, missing: int) -> Node:
    if missing < 0:
        return _emit(node, aten.flatten.using_ints, operand, 0, -missing)
    for _ in range(missing):
        operand = _emit(node, aten.unsqueeze.default, operand, 0)
    return operand  # type: ignore[no-any-return]


def _flatten_mask(node: Node, mask: Any, query: Any, extra: int) -> Any:
    """The mask, with leading dimensions flattened like the query's if it has more than three dimensions."""
    if mask is None or mask.meta["val"].dim() < _RANK:
        return mask
    rank = query.meta["val"].dim()
    for _ in range(rank - mask.meta["val"].dim()):
        mask = _emit(node, aten.unsqueeze.default, mask, 0)
    sizes: list[Any] = [_emit(node, aten.sym_size.int, query, i) for i in range(extra + 1)]
    mask = _emit(node, aten.expand.default, mask, [*sizes, *[-1] * (rank - len(sizes))])
    return _emit(node, aten.flatten.using_ints, mask, 0, extra)


def _emit(node: Node, target: Any, *args: Any, **kwargs: Any) -> Node:
    """A new node before ``node``, with the example value from which the exporter reads shapes."""
    fresh = node.graph.call_function(target, args, kwargs)
    fresh.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
    values = torch.fx.node.map_arg((args, kwargs), lambda operand: operand.meta["val"])
    fresh.meta["val"] = target(*values[0], **values[1])
    return fresh
