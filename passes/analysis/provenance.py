"""The provenance of each value in a graph: the operators that its features come from.

Products, look-ups, residual sums and gates make new features. Views, casts, norms, rotations, biases, masks and
dropout only pass on the provenance of their operands. A *source* of a value is an operator that made its features,
with what happened since: which part was cut out, and whether a non-linearity was applied. Time is linear in the number
of nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.analysis.dataflow import is_in_place, operator_name

#: Products of two values, which may both be activations.
PRODUCTS = {"linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "einsum", "mv", "_grouped_mm"}
ATTENTIONS = {"scaled_dot_product_attention", "flex_attention"}
_RECURRENT = {"lstm", "gru", "rnn_tanh", "rnn_relu", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell"}
_ADDITIONS = {"add", "add_", "sub", "sub_"}
_MULTIPLICATIONS = {"mul", "mul_"}
_NON_LINEARITIES = {
    "celu", "elu", "erf", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "log_sigmoid", "mish",
    "prelu", "relu", "relu6", "relu_", "rrelu", "selu", "sigmoid", "silu", "silu_", "softmax", "softplus", "tanh",
    "threshold",
}  # fmt: skip
_CUTS = {"slice", "select", "narrow"}
#: A value with more sources than this counts as new features, of kind ``mixture``.
_MOST_SOURCES = 12


@dataclasses.dataclass(frozen=True)
class Source:
    """One source of a value.

    Attributes:
        node: the operator that made the features.
        part: the node that last cut a part out of them, if any.
        is_nonlinear: whether a non-linearity was applied to them since.
    """

    node: Node
    part: Node | None = None
    is_nonlinear: bool = False


Provenance = frozenset[Source]


@dataclasses.dataclass(frozen=True)
class Sink:
    """An operator that makes new features from a value, and one source of that value."""

    node: Node
    source: Source


@dataclasses.dataclass(kw_only=True)
class ProvenanceTrace:
    """The provenance of all values in one graph.

    Attributes:
        provenance: the sources of each node's value; empty if it depends on constants, weights and integers only.
        kinds: the kind of each operator that makes new features: ``weighted``, ``input``, ``product``, ``sum``,
            ``gate`` (an elementwise product of two branches) or ``mixture``.
        sinks: by a source's node, the operators that make new features from it, in graph order.
        read: by such an operator, the sources of its operands; see :meth:`inputs`.
    """

    provenance: dict[Node, Provenance]
    kinds: dict[Node, str]
    sinks: dict[Node, list[Sink]]
    read: dict[Node, list[Source]]

    def inputs(self, node: Node) -> list[Source]:
        """The sources of the operands of an operator that makes new features."""
        return self.read.get(node, [])

    def source_nodes(self, value: Any, kind: str | None = None) -> set[Node]:
        """The operators that are sources of a value; only those of one kind, if it is given."""
        found = {source.node for source in self.provenance.get(value, ())}
        return {node for node in found if kind is None or self.kinds[node] == kind}


def trace_provenance(graph: Graph, weighted: Mapping[Node, Sequence[Node]]) -> ProvenanceTrace:
    """Find the provenance of every value of a graph.

    Args:
        graph: the graph, with example values in ``meta["val"]``.
        weighted: operators that compute with a weight → their operands that are not the weight.
    """
    trace = ProvenanceTrace(provenance={}, kinds={}, sinks={}, read={})
    for node in graph.nodes:
        kind = _find_kind(node, trace, weighted)
        if kind is None:
            trace.provenance[node] = _pass_on(node, trace)
        else:
            for value in weighted.get(node, node.all_input_nodes):
                for source in trace.provenance[value]:
                    trace.sinks.setdefault(source.node, []).append(Sink(node, source))
                    trace.read.setdefault(node, []).append(source)
            trace.kinds[node] = kind
            trace.provenance[node] = frozenset({Source(node)}) if kind != "output" else frozenset()
        if is_in_place(node) and isinstance(node.args[0], Node):
            trace.provenance[node.args[0]] = trace.provenance[node]
    return trace


def is_recurrent(node: Node) -> bool:
    """Whether the operator is a whole recurrent layer or one step of it."""
    return operator_name(node) in _RECURRENT


def is_convolution(node: Node) -> bool:
    """Whether the operator is a convolution, transposed or not."""
    return "conv" in operator_name(node)


def _find_kind(node: Node, trace: ProvenanceTrace, weighted: Mapping[Node, Sequence[Node]]) -> str | None:
    """The kind of new features that the node makes, or ``None`` if it passes on those of its operands."""
    if node.op in ("placeholder", "output"):
        is_input = node.op == "placeholder" and _is_floating(node)
        return "input" if is_input else "output" if node.op == "output" else None
    if node in weighted:
        return None if _is_depthwise(node) else "weighted"
    if not _is_floating(node):
        return None
    branches = [trace.provenance[value] for value in node.all_input_nodes if trace.provenance[value]]
    return _find_junction(node, branches, trace) if branches else None


def _find_junction(node: Node, branches: Sequence[Provenance], trace: ProvenanceTrace) -> str | None:
    name = operator_name(node)
    if name in PRODUCTS or name in ATTENTIONS or is_recurrent(node):
        return "product"
    if name == "glu":
        return "gate"
    if name in _ADDITIONS and _differ(branches):
        return "sum"
    if name in _MULTIPLICATIONS and len(branches) == 2 and _is_gate(branches, trace):
        return "gate"
    return "mixture" if len(frozenset().union(*branches)) > _MOST_SOURCES else None


def _pass_on(node: Node, trace: ProvenanceTrace) -> Provenance:
    if not _is_floating(node):
        return frozenset()
    union: Provenance = frozenset().union(*(trace.provenance[value] for value in node.all_input_nodes))
    name = operator_name(node)
    if name in _NON_LINEARITIES:
        return frozenset(dataclasses.replace(source, is_nonlinear=True) for source in union)
    if name == "getitem" or (name in _CUTS and _cuts(node)):
        return frozenset(dataclasses.replace(source, part=node) for source in union)
    # In x · σ(x), a non-linearity in separate operators, only the branch through σ counts.
    return frozenset(o for o in union if o.is_nonlinear or dataclasses.replace(o, is_nonlinear=True) not in union)


def _cuts(node: Node) -> bool:
    """Whether the node cuts out a part of the features; slices of the batch and of everything do not."""
    if len(node.args) < 2 or node.args[1] == 0:
        return False
    _, _, start, end, step = (*node.args, *(0, 2**63 - 1, 1)[len(node.args) - 2 :])[:5]
    is_whole = operator_name(node) == "slice" and start in (0, None) and step == 1
    return not (is_whole and (end is None or (isinstance(end, int) and end >= 2**62)))


def _differ(branches: Sequence[Provenance]) -> bool:
    """Whether two values have different sources, and neither's sources include all of the other's."""
    if len(branches) != 2:
        return False
    mine, theirs = ({source.node for source in branch} for branch in branches)
    return not (mine <= theirs or theirs <= mine)


def _is_gate(branches: Sequence[Provenance], trace: ProvenanceTrace) -> bool:
    """Whether the operands are two branches, or two parts of one value, one of them through a non-linearity."""
    if any(all("embedding" in operator_name(source.node) for source in branch) for branch in branches):
        return False  # a table of angles or scales
    if _differ(branches):
        return not any(_is_attended(source, trace) for branch in branches for source in branch)
    parts = [{source.part for source in branch} for branch in branches]
    nonlinear = [all(source.is_nonlinear for source in branch) for branch in branches]
    return parts[0].isdisjoint(parts[1]) and nonlinear[0] != nonlinear[1]


def _is_attended(source: Source, trace: ProvenanceTrace) -> bool:
    """Whether a source is the result of attention; a gate after attention does not make new features."""
    return trace.kinds[source.node] == "product" and not is_recurrent(source.node)


def _is_depthwise(node: Node) -> bool:
    """Whether it is a depthwise convolution, which does not mix features."""
    if not is_convolution(node) or len(node.args) < 7 or not isinstance(node.args[1], Node):
        return False
    kernel = node.args[1].meta.get("val")
    groups = node.args[6]
    return (
        isinstance(kernel, torch.Tensor)
        and isinstance(groups, int)
        and 1 < groups == kernel.shape[0]
        and kernel.shape[1] == 1
    )


def _is_floating(node: Node) -> bool:
    """Whether the node gives, or may give, floating-point or complex values."""
    values = node.meta.get("val")
    if isinstance(values, torch.Tensor):
        return bool(values.is_floating_point() or values.is_complex())
    if isinstance(values, (tuple, list)):
        return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)
    return values is None and node.op != "get_attr"
