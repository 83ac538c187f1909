"""Graphs of modules whose Python asks for values of tensors, with the answers of an example.

``if mask.any():`` or ``if labels.max() >= size: raise`` cannot be decided without values. Such a module is traced
with the values of its example; answers that were true become assertions in the graph, others are lost. Such a graph is
right for values that answer like the example's, and for nothing that is not checked: exports are the only ones that use
them, as a last resort, with the lines in their report.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import PurePath

import torch
import torch._functorch.config
from torch import nn
from torch._subclasses import meta_utils
from torch.fx import GraphModule, Node

from passes.base import find_graph_modules
from passes.capture.quiet import quiet_loggers

logger = logging.getLogger(__name__)

_ASSERT = torch.ops.aten._assert_scalar.default


@contextlib.contextmanager
def values_of_example() -> Iterator[None]:
    """Inside, a trace decides what depends on values by those of the example, and asserts them in the graph."""
    with (
        torch._functorch.config.patch(
            fake_tensor_propagate_real_tensors=True, generate_fake_kernels_from_real_mismatches=True
        ),
        _values_of_parameters(),
        _as_in_eager_code(),
        # They warn of every decision, which is what is wanted here.
        quiet_loggers("torch.fx.experimental.symbolic_shapes", "torch._subclasses"),
    ):
        yield


@contextlib.contextmanager
def _values_of_parameters() -> Iterator[None]:
    """Inside, a trace with values has those of Parameters too.

    PyTorch (2.13) copies the values of plain tensors only; where a Parameter's should be, it leaves whatever the
    memory held, and a branch is decided by chance.
    """
    name = "_safe_copy"
    original = getattr(meta_utils, name, None)
    if original is None:
        yield
        return

    def copy(target: torch.Tensor, source: torch.Tensor | None) -> None:
        original(target, source.detach() if isinstance(source, nn.Parameter) else source)

    setattr(meta_utils, name, copy)
    try:
        yield
    finally:
        setattr(meta_utils, name, original)


@contextlib.contextmanager
def _as_in_eager_code() -> Iterator[None]:
    """Inside, only PyTorch itself is told that a module is being exported.

    Models that ask take another path then, to avoid branches on values. Here these are no obstacle, and the other
    path may be one that was never run: several models of transformers fail on it.
    """
    original = torch.compiler.is_exporting

    def is_exporting() -> bool:
        asks = str(sys._getframe(1).f_globals.get("__name__", ""))
        return original() and asks.partition(".")[0] == "torch"

    torch.compiler.is_exporting = is_exporting
    try:
        yield
    finally:
        torch.compiler.is_exporting = original


def find_assumptions(graph_module: GraphModule) -> tuple[str, ...]:
    """The lines of the model whose questions for values a graph answers as in the example; each once."""
    nodes = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes if node.target is _ASSERT]
    return tuple(dict.fromkeys(_name_line(node) for node in nodes))


def _name_line(node: Node) -> str:
    """``model.py:12: if mask.any():`` by the node's own record, or what the assertion says."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not places:
        return str(node.args[1] if len(node.args) > 1 else node)
    path, number, *_ = lines[places[-1]].removeprefix('File "').replace('", line ', ", ").split(", ")
    return ": ".join([f"{PurePath(path).name}:{number}", *lines[places[-1] + 1 : places[-1] + 2]])
