"""The nodes that an output depends on, including in-place writes."""

from __future__ import annotations

import torch
from torch.fx import Graph

from passes.analysis.dataflow import build_dataflow, find_nodes_reaching_output

aten = torch.ops.aten


def test_dead_values_do_not_reach_the_output() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    live = graph.call_function(aten.relu.default, (x,))
    dead = graph.call_function(aten.neg.default, (live,))
    output = graph.output((live,))
    assert find_nodes_reaching_output(graph) == {x, live, output}
    assert dead not in find_nodes_reaching_output(graph)
    assert list(build_dataflow(graph).edges) == [(x, live), (live, dead), (live, output)]


def test_writes_in_place_reach_later_readers_and_buffers() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    buffer = graph.get_attr("running")
    update = graph.call_function(aten.neg.default, (x,))
    written = graph.call_function(aten.add_.Tensor, (buffer, update))
    value = graph.call_function(aten.relu.default, (x,))
    addend = graph.call_function(aten.abs.default, (x,))
    inner = graph.call_function(aten.add_.Tensor, (value, addend))
    graph.output((value,))
    reaching = find_nodes_reaching_output(graph)
    assert {update, written, addend, inner} <= reaching


def test_writes_into_a_view_reach_readers_of_the_whole() -> None:
    graph = Graph()
    x = graph.placeholder("x")
    whole = graph.call_function(aten.relu.default, (x,))
    addend = graph.call_function(aten.neg.default, (x,))
    scaled = graph.call_function(aten.mul_.Tensor, (whole, 2))
    view = graph.call_function(aten.slice.Tensor, (scaled, 0, 0, 1))
    row = graph.call_function(aten.select.int, (view, 0, 0))
    written = graph.call_function(aten.add_.Tensor, (row, addend))
    graph.output((whole,))
    assert {addend, written, row, view, scaled} <= find_nodes_reaching_output(graph)
