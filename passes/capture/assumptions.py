"""Trace modules whose control flow depends on tensor values, with the values of an example.

``if mask.any():`` or ``if labels.max() >= size: raise`` cannot be decided without values. Such a module is traced with
the values of its example. Conditions that were true become assertions in the graph; the others are lost. The graph is
only right for values that decide all conditions as the example does, and not all of this is checked. Only exports use
such graphs, as a last resort, and report the lines.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from pathlib import PurePath

import torch
from torch.fx import GraphModule, Node

from passes.base import find_graph_modules
from passes.capture.quiet import quiet_loggers
from passes.compat import SHAPE_LOGGER, SUBCLASS_LOGGER, values_in_fake_tensors

logger = logging.getLogger(__name__)

_ASSERT = torch.ops.aten._assert_scalar.default


@contextlib.contextmanager
def values_of_example() -> Iterator[None]:
    """Inside, a trace decides conditions on values by the example's values, and asserts them in the graph."""
    with (
        values_in_fake_tensors(),
        _as_in_eager_code(),
        # These warn about every decision, which is expected here.
        quiet_loggers(SHAPE_LOGGER, SUBCLASS_LOGGER),
    ):
        yield


@contextlib.contextmanager
def _as_in_eager_code() -> Iterator[None]:
    """Inside, ``torch.compiler.is_exporting()`` is true for PyTorch's own code only.

    Some models take another path during export, to avoid branches on values. Such branches are no problem here, and
    the other path may be untested: several models of transformers fail on it.
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
    """The lines of the model whose conditions on values a graph assumes as in the example, without duplicates."""
    nodes = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes if node.target is _ASSERT]
    return tuple(dict.fromkeys(_name_line(node) for node in nodes))


def _name_line(node: Node) -> str:
    """``model.py:12: if mask.any():`` from the node's stack trace, or the text of the assertion."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not places:
        return str(node.args[1] if len(node.args) > 1 else node)
    path, number, *_ = lines[places[-1]].removeprefix('File "').replace('", line ', ", ").split(", ")
    return ": ".join([f"{PurePath(path).name}:{number}", *lines[places[-1] + 1 : places[-1] + 2]])
