"""Find the first node of an exported file whose value differs from the graph it was translated from.

The exporter names each ONNX value after its node of the fx graph, so the intermediate values of both sides can be
compared, a handful at a time, in graph order.
"""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node

from adapter_compiler.errors import VerificationError
from adapter_compiler.onnx.verification.values import run_session
from adapter_compiler.onnx.verification.verify import compare_values, open_session

logger = logging.getLogger(__name__)

#: Intermediate values that one run returns; few, so that little memory is used.
_AT_A_TIME = 32


def describe_first_difference(
    path: Path, program: ExportedProgram | None, inputs: Sequence[str], tensors: Sequence[torch.Tensor]
) -> str:
    """Text for the end of an error message that names the first node that differs; empty if it cannot be found.

    Args:
        path: the file.
        program: what it was translated from; ``None`` if that is not known node by node.
        inputs: names of the file's inputs.
        tensors: the call's tensors, in the same order.
    """
    if program is None:
        return ""
    try:
        found = find_first_difference(path, program, inputs, tensors)
    except Exception as failure:  # the search must not hide the error it explains
        logger.info("the first node that differs was not found: %s", failure)
        return ""
    return f"; the first node that differs is {found}" if found else ""


def find_first_difference(
    draft: Path, program: ExportedProgram, inputs: Sequence[str], tensors: Sequence[torch.Tensor]
) -> str | None:
    """The first node whose value differs, with its operator and its place in the model.

    Args:
        draft: the exported file.
        program: what it was translated from, as the exporter decomposed it.
        inputs: names of the file's inputs.
        tensors: the call's tensors, in the same order.

    Returns:
        For example ``node_linear_3 (Add, encoder.0.query)``, or ``None`` if no value that both sides have differs.
    """
    model = onnx.load(draft, load_external_data=False)
    graph_module = program.module()
    assert isinstance(graph_module, GraphModule)
    known = {node.name for node in graph_module.graph.nodes if node.op == "call_function"}
    producers = [(value, node) for node in model.graph.node for value in node.output if value in known]
    feeds = dict(zip(inputs, tensors, strict=True))
    for chunk in _chunks(producers):
        names = [value for value, _ in chunk]
        expected = _run_graph(graph_module, tensors, set(names))
        found = _run_opened(draft, model, names, feeds)
        for value, node in chunk:
            if _differs(found.get(value), expected.get(value)):
                return f"{node.name or value} ({node.op_type}{_spell_place(node)})"
    return None


def _chunks(items: list[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, _AT_A_TIME)):
        yield chunk


class _Recorder(Interpreter):
    """Runs a graph and keeps the tensors of some of its nodes."""

    def __init__(self, graph_module: GraphModule, wanted: set[str]) -> None:
        super().__init__(graph_module)
        self.wanted = wanted
        self.values: dict[str, torch.Tensor] = {}

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        if n.name in self.wanted and isinstance(value, torch.Tensor):
            self.values[n.name] = value.detach().clone()
        return value


def _run_graph(graph_module: GraphModule, tensors: Sequence[torch.Tensor], wanted: set[str]) -> dict[str, torch.Tensor]:
    recorder = _Recorder(graph_module, wanted)
    with torch.no_grad():
        recorder.run(list(tensors))
    return recorder.values


def _run_opened(
    draft: Path, model: onnx.ModelProto, names: list[str], feeds: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Values of the named intermediates; the copy that returns them is beside the draft, where its external data is."""
    opened = onnx.ModelProto()
    opened.CopyFrom(model)
    del opened.graph.output[:]
    opened.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    with tempfile.NamedTemporaryFile(dir=draft.parent, suffix=".onnx") as file:
        onnx.save(opened, file.name)
        session = open_session(file.name)
    return dict(zip(names, run_session(session, names, feeds), strict=True))


def _differs(found: torch.Tensor | None, want: torch.Tensor | None) -> bool:
    if found is None or want is None:
        return False
    if want.is_floating_point() and not bool(want.isfinite().any()):
        return False
    try:
        compare_values("", "", found, want.cpu())
    except VerificationError:
        return True
    return False


def _spell_place(node: onnx.NodeProto) -> str:
    """The submodule that the node came from, as the exporter recorded it."""
    properties = {entry.key: entry.value for entry in node.metadata_props}
    scopes = [scope.strip(" '\"") for scope in properties.get("pkg.torch.onnx.name_scopes", "").strip("[]").split(",")]
    modules = [scope for scope in scopes[:-1] if scope.startswith("module.module.")]
    return f", {modules[-1].removeprefix('module.module.')}" if modules else ""
