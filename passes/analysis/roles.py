"""Find the role of each weight from the dataflow, without looking at names.

    attention.query, .key, .value       its product is that argument of an attention; .qkv, .kv, .qk where packed
    attention.output                    its product reads the result of an attention
    feed_forward.gate, .up, .gate_up    the branch through a non-linearity, the other branch, both packed
    feed_forward.down                   reads the product of the branches, or ``up`` through a non-linearity
    expert.*                            the same for stacked weights, one matrix per expert
    router                              decides a top-k, or scales a whole branch by one number
    embedding, patch_embedding          a look-up, or values that are added or prepended; a convolution of patches
    head                                the last weights before an output
    convolution, recurrent              other convolutions; LSTM, GRU and other recurrent layers
    linear                              any other matrix product
    other                               any other operator

In the graph of a part of a model, roles are those that this part shows. Heads and patch embeddings are only found in
the graph of a whole model; a head also if it is a graph of its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from passes.analysis.attention import find_attentions
from passes.analysis.dataflow import operator_name
from passes.analysis.feed_forward import find_feed_forward_roles
from passes.analysis.heads import find_heads
from passes.analysis.provenance import ProvenanceTrace, is_convolution, is_recurrent, trace_provenance
from passes.analysis.weight_uses import GraphUse, WeightUse
from passes.capture.capture import MODULE_PREFIX

_PARTS = {
    frozenset({"query"}): "query",
    frozenset({"key"}): "key",
    frozenset({"value"}): "value",
    frozenset({"key", "value"}): "kv",
    frozenset({"query", "key"}): "qk",
    frozenset({"query", "key", "value"}): "qkv",
}
_FEED_FORWARD = ("gate", "up", "gate_up", "down")
#: All roles.
ROLES = (
    *(f"attention.{part}" for part in (*_PARTS.values(), "output")),
    *(f"feed_forward.{part}" for part in _FEED_FORWARD),
    *("expert", *(f"expert.{part}" for part in _FEED_FORWARD), "router"),
    *("embedding", "patch_embedding", "head", "convolution", "recurrent", "linear", "other"),
)

_PRODUCTS = {
    "linear", "matmul", "__matmul__", "mm", "addmm", "mv", "bmm", "baddbmm", "einsum", "tensordot",
    "multi_head_attention_forward",
}  # fmt: skip
_CHOICES = {"topk", "argmax"}
_ADDED = {"add", "add_", "cat"}
#: Most views, casts and resizings to follow from a weight, or from patches, to the operator that uses their values.
_LONGEST = 16


def find_roles(uses: Mapping[str, Sequence[WeightUse]]) -> dict[str, str]:
    """The role of each weight, one of :data:`ROLES`, by the weight's name.

    Args:
        uses: every use of each weight, from :func:`passes.analysis.weight_uses.find_weight_uses` for one or more graphs
            and from :class:`passes.analysis.python_uses.WatchWeights`.
    """
    views: dict[tuple[GraphModule, Graph], _View] = {}
    for name, found in uses.items():
        for use in found:
            if isinstance(use, GraphUse):
                key = use.graph_module, use.node.graph
                view = views.setdefault(key, _View(use.node.graph))
                view.names.setdefault(use.node, []).append(name)
                view.uses.setdefault(use.node, use)
                view.is_whole |= use.source.target == MODULE_PREFIX + name and not use.regions
    last = next(reversed(views.values()), None)
    votes: dict[str, list[str]] = {}
    known: dict[Hashable, dict[Node, str]] = {}
    for view in views.values():
        is_end = view.is_whole or (view is last and len(view.uses) == 1)
        kind = (view.graph, view.is_whole, is_end, frozenset(view.uses))
        if kind not in known:  # equal regions share one graph
            known[kind] = view.find_roles(is_end=is_end)
        for node, role in known[kind].items():
            for name in view.names[node]:
                votes.setdefault(name, []).append(role)
    in_python = {n: [_name_by_operator(use.op) for use in u if not isinstance(use, GraphUse)] for n, u in uses.items()}
    return {name: _settle([*votes.get(name, []), *in_python[name]]) for name in uses}


@dataclasses.dataclass
class _View:
    """One graph, and the operators in it that compute with weights."""

    graph: Graph
    names: dict[Node, list[str]] = dataclasses.field(default_factory=dict)
    uses: dict[Node, GraphUse] = dataclasses.field(default_factory=dict)
    is_whole: bool = False

    def find_roles(self, *, is_end: bool) -> dict[Node, str]:
        """The role of each operator that computes with a weight."""
        trace = trace_provenance(self.graph, {node: self._operands(node) for node in self.uses if _makes_new(node)})
        roles = {n: f"attention.{part}" for n, part in self._find_attention_parts(trace).items()}
        roles |= {node: "router" for node in self._find_routers(trace) if node not in roles}
        for node, part in find_feed_forward_roles(trace, self._is_product, roles).items():
            roles[node] = f"{'expert' if self._is_stacked(node) else 'feed_forward'}.{part}"
        if is_end:
            fixed = {node for node, role in roles.items() if role.startswith(("attention", "router", "expert"))}
            roles |= dict.fromkeys(find_heads(self.graph, trace, self._is_product, fixed), "head")
        return {node: roles.get(node) or self._name_other(node, trace) for node in self.uses}

    def _operands(self, node: Node) -> list[Node]:
        """The operands of an operator without the weight."""
        activation = self.uses[node].activation
        return [activation] if activation is not None else [v for v in node.all_input_nodes if not _is_weight(v)]

    def _is_product(self, node: Node) -> bool:
        """Whether it is a matrix product with a weight, also as a 1-D convolution with kernel size 1."""
        return node in self.uses and (_multiplies(node) or _kernel(node) == (1,))

    def _is_stacked(self, node: Node) -> bool:
        return len(_weight_shape(self.uses[node])) == 3 and _multiplies(node)

    def _find_attention_parts(self, trace: ProvenanceTrace) -> dict[Node, str]:
        parts: dict[Node, set[str]] = {}
        outputs: dict[Node, str] = {}
        for attention in find_attentions(self.graph, trace):
            for part, sources in attention.operands.items():
                for node in filter(self._may_attend, sources):
                    parts.setdefault(node, set()).add(part)
            outputs |= {s.node: "output" for s in trace.sinks.get(attention.node, []) if self._may_attend(s.node)}
        for node in sorted(parts, reverse=True):
            self._follow_back(node, trace, parts)
        return {**outputs, **{node: _PARTS.get(frozenset(found), "qkv") for node, found in parts.items()}}

    def _may_attend(self, node: Node) -> bool:
        return self._is_product(node) or (node in self.uses and set(_kernel(node)) == {1})

    def _follow_back(self, node: Node, trace: ProvenanceTrace, parts: dict[Node, set[str]]) -> None:
        """Give a product that is used only for queries, or only for keys and values, that role: a first projection."""
        for source in trace.inputs(node):
            sinks = {sink.node for sink in trace.sinks[source.node]}
            is_linear = not source.is_nonlinear and self._is_product(source.node)
            if is_linear and all(sink in parts or trace.kinds[sink] == "product" for sink in sinks):
                served = parts.get(source.node, set()).union(*(parts.get(sink, set()) for sink in sinks))
                if len(served) < len(("query", "key", "value")):
                    parts[source.node] = served

    def _find_routers(self, trace: ProvenanceTrace) -> set[Node]:
        chosen = [node.args[0] for node in self.graph.nodes if operator_name(node) in _CHOICES]
        routers = {node for value in chosen for node in trace.source_nodes(value, "weighted") if self._is_product(node)}
        for gate in (node for node, kind in trace.kinds.items() if kind == "gate"):
            nonlinear = {source.node for source in trace.inputs(gate) if source.is_nonlinear}
            routers |= {node for node in nonlinear if self._is_product(node) and _is_one_number(node)}
        return routers

    def _name_other(self, node: Node, trace: ProvenanceTrace) -> str:
        if self._is_stacked(node):
            return "expert"
        if is_convolution(node) and self.is_whole and self._makes_tokens(node, trace):
            return "patch_embedding"
        role = _name_by_operator(operator_name(node))
        return "embedding" if role == "other" and _is_added(node) else role

    def _makes_tokens(self, node: Node, trace: ProvenanceTrace) -> bool:
        """Whether a convolution turns patches into tokens.

        It either reads each place of an input once, or has a stride and its result becomes a sequence that goes into a
        sum. A convolution that only shortens the sequence for keys and values does not go into a sum.
        """
        at_input = all(trace.kinds[source.node] == "input" for source in trace.inputs(node))
        is_summed = any(trace.kinds[sink.node] == "sum" for sink in trace.sinks.get(node, []))
        return (at_input and _covers_patches(node)) or (_strides(node) and is_summed and _becomes_a_sequence(node))


def _settle(votes: Sequence[str]) -> str:
    """The role of a weight whose uses have these roles: the most frequent one, or the union of attention's parts."""
    parts = {name: part for part, name in _PARTS.items()}
    attending = [vote.removeprefix("attention.") for vote in votes if vote.startswith("attention.")]
    if attending and len(attending) == len(votes) and set(attending) <= parts.keys():
        union: frozenset[str] = frozenset().union(*(parts[vote] for vote in attending))
        return f"attention.{_PARTS.get(union, 'qkv')}"
    return Counter(votes).most_common(1)[0][0] if votes else "other"


def _name_by_operator(op: str) -> str:
    if "embedding" in op or op in _ADDED:
        return "embedding"
    if "conv" in op:
        return "convolution"
    if op.startswith(("lstm", "gru", "rnn")):
        return "recurrent"
    return "linear" if op in _PRODUCTS or "grouped_mm" in op else "other"


def _is_weight(value: Node) -> bool:
    """Whether it is a weight or a view of one."""
    while value.op != "get_attr" and len(value.all_input_nodes) == 1:
        (value,) = value.all_input_nodes
    return value.op == "get_attr"


def _makes_new(node: Node) -> bool:
    """Whether the operator makes new features; one that adds, scales or reshapes with a weight does not."""
    return _multiplies(node) or is_convolution(node) or is_recurrent(node) or "embedding" in operator_name(node)


def _multiplies(node: Node) -> bool:
    return operator_name(node) in _PRODUCTS or "grouped_mm" in operator_name(node)


def _weight_shape(use: GraphUse) -> tuple[int, ...]:
    owner = use.source.graph.owning_module
    assert owner is not None
    return tuple(owner.get_parameter(str(use.source.target)).shape)


def _kernel(node: Node) -> tuple[int, ...]:
    """The kernel size of a convolution; empty for other operators."""
    weight = node.args[1] if is_convolution(node) and len(node.args) > 1 else None
    return tuple(weight.meta["val"].shape[2:]) if isinstance(weight, Node) and "val" in weight.meta else ()


def _covers_patches(node: Node) -> bool:
    """Whether the convolution reads each place at most once: its stride is at least its kernel size, which is not 1."""
    kernel, stride = _kernel(node), node.args[3] if len(node.args) > 3 else [1]
    steps = list(stride) * len(kernel) if isinstance(stride, (list, tuple)) and len(stride) == 1 else stride
    return any(size > 1 for size in kernel) and all(a <= b for a, b in zip(kernel, steps, strict=True))  # type: ignore[arg-type]


def _strides(node: Node) -> bool:
    steps = node.args[3] if len(node.args) > 3 else ()
    return isinstance(steps, (list, tuple)) and any(isinstance(step, int) and step > 1 for step in steps)


def _becomes_a_sequence(node: Node) -> bool:
    """Whether an image or video is flattened to a sequence before any other use."""
    for later in _follow(node):
        if "val" in later.meta and later.meta["val"].dim() == 3:
            return bool(node.meta["val"].dim() > 3)
    return False


def _is_added(node: Node) -> bool:
    """Whether a weight's values are added to activations or concatenated with them, possibly resized."""
    return any(operator_name(user) in _ADDED for later in _follow(node) for user in later.users)


def _follow(node: Node) -> Iterator[Node]:
    """The node and the chain of operators after it, as long as each has one user and that user has one operand."""
    for _ in range(_LONGEST):
        yield node
        users = [user for user in node.users if "sym" not in operator_name(user)]
        if len(users) != 1 or len([value for value in users[0].all_input_nodes if _is_tensor(value)]) != 1:
            return
        (node,) = users


def _is_tensor(value: Node) -> bool:
    return isinstance(value.meta.get("val"), torch.Tensor)


def _is_one_number(node: Node) -> bool:
    return bool(node.meta["val"].shape[-1] == 1) if "val" in node.meta else False
