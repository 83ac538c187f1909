"""Where the values of a graph come from: back to the last operator that made something new of them.

Views, casts, norms, rotations, biases, masks and dropout keep what a value is about; products, look-ups,
residual sums and gates make something new. An *origin* is such an operator, with what happened since: which
part was cut out, and whether a non-linearity was applied. Time is linear in the number of nodes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from passes.analysis.dataflow import is_in_place, operator_name

#: Products of two values, neither of which need be a weight.
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
#: A value of more origins than this is a mixture, and counts as something new.
_MOST_ORIGINS = 12


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a value is about.

    Attributes:
        node: the operator that made it.
        part: the node that last cut a part out of it, if any.
        is_nonlinear: whether it went through a non-linearity since.
    """

    node: Node
    part: Node | None = None
    is_nonlinear: bool = False


Origins = frozenset[Origin]


@dataclasses.dataclass(frozen=True)
class Sink:
    """An operator that makes something new of a value, and what that value is about."""

    node: Node
    origin: Origin


@dataclasses.dataclass(kw_only=True)
class OriginTrace:
    """The origins in one graph.

    Attributes:
        origins: by node; none for what depends on constants, weights and integers only.
        kinds: what each operator that makes something new is: ``weighted``, ``input``, ``product``, ``sum``,
            ``gate`` (a product of two branches, entry by entry) or ``mixture``.
        sinks: by origin's node, what makes something new of it, in graph order.
        read: the same by the operator that reads; see :meth:`inputs`.
    """

    origins: dict[Node, Origins]
    kinds: dict[Node, str]
    sinks: dict[Node, list[Sink]]
    read: dict[Node, list[Origin]]

    def inputs(self, node: Node) -> list[Origin]:
        """What the operands of an operator that makes something new are about."""
        return self.read.get(node, [])

    def sources(self, value: Any, kind: str | None = None) -> set[Node]:
        """The operators that a value is about; of one kind, if given."""
        found = {origin.node for origin in self.origins.get(value, ())}
        return {node for node in found if kind is None or self.kinds[node] == kind}


def trace_origins(graph: Graph, weighted: Mapping[Node, Sequence[Node]]) -> OriginTrace:
    """The origins of every value of a graph.

    Args:
        graph: the graph.
        weighted: operators that compute with a weight → their operands that are not the weight.
    """
    trace = OriginTrace(origins={}, kinds={}, sinks={}, read={})
    for node in graph.nodes:
        kind = _find_kind(node, trace, weighted)
        if kind is None:
            trace.origins[node] = _pass_on(node, trace)
        else:
            for value in weighted.get(node, node.all_input_nodes):
                for origin in trace.origins[value]:
                    trace.sinks.setdefault(origin.node, []).append(Sink(node, origin))
                    trace.read.setdefault(node, []).append(origin)
            trace.kinds[node] = kind
            trace.origins[node] = frozenset({Origin(node)}) if kind != "output" else frozenset()
        if is_in_place(node) and isinstance(node.args[0], Node):
            trace.origins[node.args[0]] = trace.origins[node]
    return trace


def is_recurrent(node: Node) -> bool:
    """Whether the operator is a whole recurrent layer or one step of it."""
    return operator_name(node) in _RECURRENT


def is_convolution(node: Node) -> bool:
    """Whether the operator is a convolution, transposed or not."""
    return "conv" in operator_name(node)


def _find_kind(node: Node, trace: OriginTrace, weighted: Mapping[Node, Sequence[Node]]) -> str | None:
    """What new thing the node makes, or ``None`` if it passes its operands on."""
    if node.op in ("placeholder", "output"):
        is_input = node.op == "placeholder" and _is_real(node)
        return "input" if is_input else "output" if node.op == "output" else None
    if node in weighted:
        return None if _is_depthwise(node) else "weighted"
    if not _is_real(node):
        return None
    branches = [trace.origins[value] for value in node.all_input_nodes if trace.origins[value]]
    return _find_junction(node, branches, trace) if branches else None


def _find_junction(node: Node, branches: Sequence[Origins], trace: OriginTrace) -> str | None:
    name = operator_name(node)
    if name in PRODUCTS or name in ATTENTIONS or is_recurrent(node):
        return "product"
    if name == "glu":
        return "gate"
    if name in _ADDITIONS and _differ(branches):
        return "sum"
    if name in _MULTIPLICATIONS and len(branches) == 2 and _is_gate(branches, trace):
        return "gate"
    return "mixture" if len(frozenset().union(*branches)) > _MOST_ORIGINS else None


def _pass_on(node: Node, trace: OriginTrace) -> Origins:
    if not _is_real(node):
        return frozenset()
    union: Origins = frozenset().union(*(trace.origins[value] for value in node.all_input_nodes))
    name = operator_name(node)
    if name in _NON_LINEARITIES:
        return frozenset(dataclasses.replace(origin, is_nonlinear=True) for origin in union)
    if name == "getitem" or (name in _CUTS and _cuts(node)):
        return frozenset(dataclasses.replace(origin, part=node) for origin in union)
    # Of x · σ(x), a non-linearity written out, only what went through it counts.
    return frozenset(o for o in union if o.is_nonlinear or dataclasses.replace(o, is_nonlinear=True) not in union)


def _cuts(node: Node) -> bool:
    """Whether a part is left out; batch and whole slices are not parts."""
    if len(node.args) < 2 or node.args[1] == 0:
        return False
    _, _, start, end, step = (*node.args, *(0, 2**63 - 1, 1)[len(node.args) - 2 :])[:5]
    is_whole = operator_name(node) == "slice" and start in (0, None) and step == 1
    return not (is_whole and (end is None or (isinstance(end, int) and end >= 2**62)))


def _differ(branches: Sequence[Origins]) -> bool:
    """Whether two values are about different things, neither being a part of what the other is about."""
    if len(branches) != 2:
        return False
    mine, theirs = ({origin.node for origin in branch} for branch in branches)
    return not (mine <= theirs or theirs <= mine)


def _is_gate(branches: Sequence[Origins], trace: OriginTrace) -> bool:
    """Whether two branches meet, or two different parts of one value of which one went through a non-linearity."""
    if any(all("embedding" in operator_name(origin.node) for origin in branch) for branch in branches):
        return False  # a table of angles or scales
    if _differ(branches):
        return not any(_is_attended(origin, trace) for branch in branches for origin in branch)
    parts = [{origin.part for origin in branch} for branch in branches]
    bent = [all(origin.is_nonlinear for origin in branch) for branch in branches]
    return parts[0].isdisjoint(parts[1]) and bent[0] != bent[1]


def _is_attended(origin: Origin, trace: OriginTrace) -> bool:
    """Whether it is the result of an attention: gating that keeps it the result of an attention."""
    return trace.kinds[origin.node] == "product" and not is_recurrent(origin.node)


def _is_depthwise(node: Node) -> bool:
    """Whether it is a convolution of each channel by itself, which does not mix features."""
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


def _is_real(node: Node) -> bool:
    """Whether the node gives floating-point or complex values, or may."""
    values = node.meta.get("val")
    if isinstance(values, torch.Tensor):
        return bool(values.is_floating_point() or values.is_complex())
    if isinstance(values, (tuple, list)):
        return any(isinstance(v, torch.Tensor) and (v.is_floating_point() or v.is_complex()) for v in values)
    return values is None and node.op != "get_attr"
