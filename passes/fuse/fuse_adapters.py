"""Fuse base layers with their adapters: the same results with fewer kernels and less saved memory.

    linear(x, W, b), addmm(b, x, W), mm, matmul, + svd(x)   →  fused_linears(x, …)[0]
    the same for several weights that read one x            →  fused_linears(x, …)[0], [1], …
    any other product y with W, + svd(x)                    →  fused_update(y, x, …)
    with ``recompute``, where x = gelu(h), silu(h) or layer_norm(h, …), or a view of it
                                                            →  fused_linears(x, …, recomputation=(gelu, h))

LoRA is fused as the SVD form without λ: P = B and Q = A. Not fused: adapters that run on the weight, the reverse
direction of a weight that is used in both, and other forms. Layers are not grouped across an in-place operation, which
may change x.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
from torch.fx import GraphModule, Node

from passes.analysis.dataflow import is_in_place
from passes.base import GraphPass, PassResult, find_graph_modules
from passes.fuse.fused_ops import fused_linears, fused_update
from passes.fuse.memory_efficient_ops import tanh_gelu
from passes.operators import Product, match_product

aten = torch.ops.aten


#: Operators that are cheap to recompute, deterministic, and save their input for backward anyway.
_CHEAP = {aten.gelu.default, aten.silu.default, aten.layer_norm.default}


@dataclasses.dataclass(frozen=True)
class _Insertion:
    """The nodes of one adapter as :class:`~passes.forms.svd.SvdForm` or LoRA (without λ) emits them on activations."""

    total: Node
    output: Node
    down: Node
    P: Node
    lam: Node | None
    Q: Node
    scale: float

    @property
    def x(self) -> Node:
        """The input of the adapter in the present graph; fusing an earlier layer replaces it."""
        x = self.down.args[0]
        if _is_call(x, aten.to.dtype) and "adapter_site" in x.meta:
            x = x.args[0]
        assert isinstance(x, Node)
        return x

    @property
    def product(self) -> Product | None:
        """The base layer, if ``output`` is a product of the same x with a weight."""
        found = match_product(self.output)
        return found if found is not None and found.x is self.x else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class FuseAdaptersPass(GraphPass):
    """Fuse base layers with their adapters.

    Contract: outputs and gradients are those of the unfused graph within rounding; fused nodes keep
    ``meta["adapter_site"]``. :class:`~passes.adapt.fold_adapters.FoldAdaptersPass` does not accept a fused graph.

    Attributes:
        group_siblings: let linear layers that read the same x share one product with all their Q.
        recompute: recompute x in backward, instead of saving it, if a cheap operator made it from a tensor that
            autograd saves anyway; saves memory for a little time.
    """

    group_siblings: bool = True
    recompute: bool = False

    def call(self, graph_module: GraphModule) -> PassResult:
        """Fuse in the graph and in the regions inside it."""
        modified = False
        for body in find_graph_modules(graph_module):
            insertions = list(_find_insertions(body))
            linears = [one for one in insertions if one.product is not None]
            others = [one for one in insertions if one.product is None]
            for group in _group(linears) if self.group_siblings else [[one] for one in linears]:
                _fuse_linears(group, recompute=self.recompute)
            for one in others:
                _fuse_update(one)
            _erase_unread_adapter_nodes(body)
            modified = modified or bool(insertions)
        return PassResult(graph_module=graph_module, modified=modified)


def _find_insertions(body: GraphModule) -> Iterator[_Insertion]:
    for node in body.graph.nodes:
        if "adapter_replaces" in node.meta and node.target is aten.add.Tensor:
            found = _match(node)
            if found is not None:
                yield found


def _match(total: Node) -> _Insertion | None:
    """Recognize y + linear(linear(x, Q) * (lam * s), P), or with s alone for LoRA, with casts of x and the update."""
    output, update = total.args
    if _is_call(update, aten.type_as.default):
        update = update.args[0]
    if not _is_call(update, aten.linear.default):
        return None
    hidden, P = update.args[:2]
    if not _is_call(hidden, aten.mul.Tensor):
        return None
    down, scaled = hidden.args
    if not _is_call(down, aten.linear.default):
        return None
    if _is_call(scaled, aten.mul.Tensor):
        lam, scale = scaled.args
    elif isinstance(scaled, (int, float)):
        lam, scale = None, scaled
    else:
        return None
    return _Insertion(total, output, down, P, lam, down.args[1], scale)  # type: ignore[arg-type]


def _is_call(value: object, target: object) -> TypeGuard[Node]:
    return isinstance(value, Node) and value.target is target


def _group(insertions: list[_Insertion]) -> list[list[_Insertion]]:
    """Group the insertions that read the same x and can be computed in the place of the first one."""
    groups: list[list[_Insertion]] = []
    open_groups: dict[Node, list[_Insertion]] = {}
    for one in insertions:
        group = open_groups.get(one.x)
        if group is not None and _may_join(group[0], one):
            group.append(one)
        else:
            open_groups[one.x] = [one]
            groups.append(open_groups[one.x])
    return groups


def _may_join(first: _Insertion, one: _Insertion) -> bool:
    """Whether ``one`` can move up to ``first``: its operands exist there, and no operator in between is in place."""
    operands = [node for node in (*one.output.all_input_nodes, one.P, one.lam, one.Q) if node is not one.x]
    if any(node is not None and not node < first.output for node in operands):
        return False
    if one.P.meta.get("val") != first.P.meta.get("val"):
        return False
    node = first.output
    while node is not one.output:
        node = node.next
        if is_in_place(node):
            return False
    return True


def _fuse_linears(group: list[_Insertion], *, recompute: bool) -> None:
    first = group[0].output
    graph = first.graph
    x = group[0].x
    operands: list[Node | None] = []
    with graph.inserting_before(first):
        for one in group:
            product = one.product
            assert product is not None
            weight = product.weight
            if product.is_transposed:
                weight = graph.call_function(aten.t.default, (weight,))
                weight.meta["adapter_site"] = one.total.meta["adapter_site"]
            operands += [weight, product.bias, one.P, one.lam, one.Q]
        found = _find_recomputation(x) if recompute else None
        scales = tuple(one.scale for one in group)
        fused = graph.call_function(fused_linears, (x, scales, *operands), {"recomputation": found} if found else {})
        outputs = [graph.call_function(operator.getitem, (fused, i)) for i in range(len(group))]
    fused.meta["adapter_site"] = ", ".join(str(one.total.meta["adapter_site"]) for one in group)
    for one, output in zip(group, outputs, strict=True):
        _replace_total(one, output)
        if not one.output.users:
            graph.erase_node(one.output)


def _find_recomputation(x: Node) -> tuple[Any, ...] | None:
    """How to recompute x, if that is cheap; x may also be a view of a cheap operator's output."""
    shape = None
    if x.target is aten.view.default and isinstance(x.args[0], Node):
        x, shape = x.args[:2]  # type: ignore[assignment]
    if x.target is tanh_gelu:
        return (tanh_gelu.__name__, x.args, {}, shape)  # in arguments, graphs can print torch's functions only
    return (x.target, x.args, dict(x.kwargs), shape) if x.target in _CHEAP else None


def _fuse_update(one: _Insertion) -> None:
    graph = one.total.graph
    with graph.inserting_before(one.total):
        fused = graph.call_function(fused_update, (one.output, one.x, one.P, one.lam, one.Q, one.scale))
    _replace_total(one, fused)


def _replace_total(one: _Insertion, node: Node) -> None:
    node.meta.update(one.total.meta)
    one.total.replace_all_uses_with(node)
    for dead in _find_dead_chain(one.total):
        dead.graph.erase_node(dead)


def _find_dead_chain(node: Node) -> Iterator[Node]:
    """The node, and the inputs that become unused when it is erased, in the order in which to erase them."""
    inputs = [source for source in node.all_input_nodes if source.op == "call_function"]
    yield node
    for source in inputs:
        if not source.users and "adapter_site" in source.meta:
            yield from _find_dead_chain(source)


def _erase_unread_adapter_nodes(body: GraphModule) -> None:
    for node in reversed(list(body.graph.nodes)):
        if "adapter_site" in node.meta and node.op == "call_function" and not node.users:
            body.graph.erase_node(node)
