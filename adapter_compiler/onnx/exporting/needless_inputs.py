"""Leave out of a file what inference does not need: inputs that no output depends on, and the loss with its labels.

A loss is an output without dimensions whose name says so. It is left out, with what then is unused, if an input is
needed for nothing else and there are other outputs. A mask is needed for the others too, so it stays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator
from pathlib import Path

import onnx


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What a file does not have of a call.

    Attributes:
        inputs: names of inputs.
        outputs: names of outputs.
    """

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def leave_out_needless(draft: Path) -> LeftOut:
    """Remove needless inputs and losses from a file, in place."""
    model = onnx.load(draft, load_external_data=False)
    graph = model.graph
    needed = {output.name: _find_needed(graph, [output.name]) for output in graph.output}
    names = [value.name for value in graph.input]
    losses = [output.name for output in graph.output if _is_loss(output)]
    others = set[str]().union(*(needed[output.name] for output in graph.output if output.name not in losses))
    dropped = [name for name in losses if any(one in needed[name] and one not in others for one in names)]
    if len(dropped) == len(graph.output):
        dropped = []
    kept = set[str]().union(*(values for name, values in needed.items() if name not in dropped))
    left = LeftOut(inputs=tuple(name for name in names if name not in kept), outputs=tuple(dropped))
    if len(left.inputs) == len(names) or left == LeftOut():
        return LeftOut()
    _keep(graph.input, [value for value in graph.input if value.name not in left.inputs])
    _keep(graph.output, [value for value in graph.output if value.name not in left.outputs])
    if dropped:
        _keep(graph.node, [node for node in graph.node if any(name in kept for name in node.output)])
    onnx.save(model, draft)
    return left


def _is_loss(value: onnx.ValueInfoProto) -> bool:
    kind = value.type.tensor_type
    return "loss" in value.name.lower() and kind.HasField("shape") and not kind.shape.dim


def _find_needed(graph: onnx.GraphProto, wanted: Collection[str]) -> set[str]:
    """The names of all values that these depend on, themselves included."""
    needed = set(wanted)
    for node in reversed(graph.node):  # sorted, so that what a node reads comes before it
        if any(name in needed for name in node.output):
            needed.update(_find_read(node))
    return needed


def _find_read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, also in the graphs inside it."""
    yield from node.input
    for attribute in node.attribute:
        for inner in (attribute.g, *attribute.graphs):
            yield from (value.name for value in inner.output)
            for one in inner.node:
                yield from _find_read(one)


def _keep(field: object, values: list[object]) -> None:
    """Replace the entries of a repeated field."""
    del field[:]  # type: ignore[attr-defined]
    field.extend(values)  # type: ignore[attr-defined]
