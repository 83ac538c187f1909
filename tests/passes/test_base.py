"""The contract that is checked around every pass, and the pass manager."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn
from torch.fx import GraphModule, symbolic_trace

from passes.base import GraphPass, PassError, PassManager, PassResult, PostconditionError, PreconditionError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenamePass(GraphPass):
    """Renames the first call_module node, once."""

    wanted: str = "renamed"

    def call(self, graph_module: GraphModule) -> PassResult:
        node = next(node for node in graph_module.graph.nodes if node.op == "call_module")
        modified = node.name != self.wanted
        if modified:
            node._rename(self.wanted)
        return PassResult(graph_module=graph_module, modified=modified)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BreakPass(GraphPass):
    """Adds a node that reads a value defined after it."""

    def call(self, graph_module: GraphModule) -> PassResult:
        graph = graph_module.graph
        placeholder, node = list(graph.nodes)[:2]
        with graph.inserting_before(placeholder):
            graph.call_function(torch.relu, (node,))
        return PassResult(graph_module=graph_module, modified=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RefusePass(GraphPass):
    """Accepts no graph."""

    def requires(self, graph_module: GraphModule) -> None:
        raise ValueError("there is no conv")

    def call(self, graph_module: GraphModule) -> PassResult:
        raise AssertionError("not reached")


def trace() -> GraphModule:
    return symbolic_trace(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_a_changed_graph_is_recompiled() -> None:
    graph_module = trace()
    assert RenamePass()(graph_module).modified
    assert "renamed = " in graph_module.code
    assert not RenamePass()(graph_module).modified


def test_ensures_runs_on_the_result() -> None:
    with pytest.raises(PostconditionError, match=r"BreakPass\.ensures: "):
        BreakPass()(trace())


def test_requires_runs_before_the_pass() -> None:
    with pytest.raises(PreconditionError, match=r"RefusePass\.requires: there is no conv"):
        RefusePass()(trace())


def test_manager_reports_modification_and_shows_each_result() -> None:
    seen: list[tuple[str, bool]] = []
    manager = PassManager(
        passes=(RenamePass(), RenamePass()), observer=lambda one, result: seen.append((one.name, result.modified))
    )
    graph_module = trace()
    assert manager(graph_module).modified
    assert seen == [("RenamePass", True), ("RenamePass", False)]
    assert not manager(graph_module).modified


def test_an_error_names_the_passes_before_it() -> None:
    with pytest.raises(PassError, match=r"RefusePass failed \(passes before it: RenamePass, RenamePass\): .*no conv"):
        PassManager(passes=(RenamePass(), RenamePass(wanted="again"), RefusePass()))(trace())
    with pytest.raises(PassError, match=r"passes before it: none"):
        PassManager(passes=(RefusePass(),))(trace())
