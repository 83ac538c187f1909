"""Decompose operators that the ONNX exporter cannot translate, or translates wrongly, into operators that it can.

The operators and what they become are in :mod:`passes.export.decompositions`. Besides:

    op(number, x)     where op takes two tensors →   op(full(number), x)

Results differ from the original by rounding only; random operators draw other numbers from the same distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.fx import Graph

from passes.base import find_graph_modules
from passes.compat import OpOverload, schema_of
from passes.export.decompositions import cumulative, draws, functions, layers, layouts, ordering, products, reductions

aten = torch.ops.aten

_MODULES = (cumulative, draws, functions, layers, layouts, ordering, products, reductions)
_RULES: dict[str, Callable[..., Any]] = {name: rule for module in _MODULES for name, rule in module.RULES.items()}
#: Operators that PyTorch writes in terms of others before it looks for a rule.
_BECOMES = {"aten::chunk": "aten::split"}


def find_rules(program: ExportedProgram) -> dict[OpOverload, Callable[..., Any]]:
    """The rules for operators of a program, by overload, as ``run_decompositions`` takes them.

    Numbers in the place of a first tensor operand are replaced in the program itself.
    """
    for body in find_graph_modules(program.graph_module):
        _lift_leading_number(body.graph)
    present = {
        _without_underscore(schema_of(node.target).name)
        for body in find_graph_modules(program.graph_module)
        for node in body.graph.nodes
        if isinstance(node.target, OpOverload)
    }
    return dict(_make_table(present | {_BECOMES[name] for name in present & _BECOMES.keys()}))


def _without_underscore(name: str) -> str:
    """The operator that an in-place one becomes: the decomposition makes graphs functional first."""
    return name.removesuffix("_") if not name.endswith("__") else name


def _make_table(present: Collection[str]) -> Iterator[tuple[OpOverload, Callable[..., Any]]]:
    """The rules for operators by overload, as run_decompositions takes them."""
    for name, rule in _RULES.items():
        operator, _, overload = name.partition(".")
        if operator in present:
            yield from ((found, rule) for found in _find_overloads(operator, overload))


def _find_overloads(name: str, only: str) -> list[OpOverload]:
    """One overload of an operator, or all that return new tensors; none if the library that has it is not loaded."""
    namespace, operator = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    names = [] if packet is None else packet.overloads()
    return [getattr(packet, overload) for overload in names if overload == only or not (only or "out" in overload)]


def _lift_leading_number(graph: Graph) -> None:
    """Replace a number in the place of the first tensor operand by a tensor without dimensions."""
    for node in list(graph.nodes):
        is_operator = isinstance(node.target, OpOverload) and node.args and isinstance(node.args[0], float)
        if not is_operator or not isinstance(schema_of(node.target).arguments[0].type, torch.TensorType):
            continue
        with graph.inserting_before(node):
            lifted = graph.call_function(aten.full.default, ([], node.args[0]), {"dtype": node.meta["val"].dtype})
        lifted.meta["val"] = node.meta["val"].new_full((), node.args[0])
        node.args = (lifted, *node.args[1:])
