"""Give a graph's weights to it as arguments, so that a call does not look each of them up by its path.

    w = self.module.encoder.layer.3.dense.weight    →    forward(w, ..., x)

A path of eight names costs some eight microseconds, two hundred of them a few percent of a small training step.
:class:`LiftedGraph` reads the same parameters and buffers from the modules that hold them at every call, so that
whatever replaces them (sharding, ``functional_call``) is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node


class LiftedGraph:
    """Calls a graph module with the tensors that it holds as arguments; the graph module stays as it is."""

    def __init__(self, graph_module: GraphModule) -> None:
        """Lift the parameters and buffers that ``graph_module`` reads now."""
        graph: Graph = copy.deepcopy(graph_module.graph)
        lifted = [node for node in graph.find_nodes(op="get_attr") if _is_tensor(graph_module, str(node.target))]
        self._paths = [str(node.target) for node in lifted]
        self.look_up(graph_module)
        _make_arguments(graph, lifted)
        self._forward = GraphModule(graph_module, graph).forward

    def __call__(self, *tensors: torch.Tensor) -> Any:
        """What the graph module returns."""
        return self._forward(*self._read(), *tensors)

    def bind(self, graph_module: GraphModule) -> LiftedGraph:
        """The same function with the tensors of another graph module over the same graph."""
        bound = copy.copy(self)
        bound.look_up(graph_module)
        return bound

    def look_up(self, graph_module: GraphModule) -> None:
        """Find the modules that hold the tensors again, because some of them were exchanged."""
        self._holders = [_find_holder(graph_module, path) for path in self._paths]
        self._slots = [(_find_slots(owner, name), name) for owner, name in self._holders]

    def _read(self) -> Sequence[Any]:
        try:
            return [slots[name] for slots, name in self._slots]
        except KeyError:  # something else than a parameter or buffer stands there by now
            return [getattr(owner, name) for owner, name in self._holders]


def _is_tensor(graph_module: GraphModule, path: str) -> bool:
    owner, name = _find_holder(graph_module, path)
    return name in owner._parameters or name in owner._buffers


def _find_holder(graph_module: GraphModule, path: str) -> tuple[nn.Module, str]:
    prefix, _, name = path.rpartition(".")
    owner: Any = graph_module
    for part in prefix.split(".") if prefix else ():
        owner = getattr(owner, part)
    return owner, name


def _find_slots(owner: nn.Module, name: str) -> dict[str, Any]:
    """Where a module keeps the tensor."""
    return owner._parameters if name in owner._parameters else owner._buffers


def _make_arguments(graph: Graph, nodes: Sequence[Node]) -> None:
    with graph.inserting_before(next(iter(graph.nodes))):
        arguments = [graph.placeholder(f"weight_{index}") for index in range(len(nodes))]
    for argument, node in zip(arguments, nodes, strict=True):
        argument.meta = node.meta
        node.replace_all_uses_with(argument)
        graph.erase_node(node)
