"""A float file in the form that quantizers take, and which of its nodes must stay in float."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Set
from pathlib import Path

import onnx

from adapter_compiler.saving.onnx_files.large_weights import save_model
from passes.export.cast_onnx import find_graphs
from passes.export.separate_products import separate_products

#: The end of the name of W + ΔW, where a weight with an adapter is used by something else than a product.
_ADAPTED = ".adapted"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prepared:
    """A copy of the source that quantizers can read.

    Attributes:
        path: the copy, without its inputs for adapters.
        with_inputs: the copy with them, but without values for them, so that quantizers leave them alone; the same
            file where there are none.
        opened: what a caller may replace: the inputs and their defaults.
        kept: names of the nodes that stay in float: those of adapters, and others that read what a caller may replace.
        moved: by weights of the source, the names of their transposes in the copy.
    """

    path: Path
    with_inputs: Path
    opened: tuple[tuple[onnx.ValueInfoProto, onnx.TensorProto], ...]
    kept: tuple[str, ...]
    moved: Mapping[str, str]

    def find_name(self, initializer: str) -> str:
        """The name in the copy of a weight of the source."""
        return self.moved.get(initializer, initializer)


def prepare(source: Path, folder: Path) -> Prepared:
    """Copy a file with its products written plainly.

    Args:
        source: the float file.
        folder: where to put the copy.
    """
    model = onnx.load(source)
    moved = separate_products(model)
    graph = model.graph
    inputs = {value.name: value for value in graph.input}
    opened = {tensor.name: (inputs[tensor.name], tensor) for tensor in graph.initializer if tensor.name in inputs}
    constants = {tensor.name for tensor in graph.initializer if is_adapter(tensor.name)}
    kept = [node.name for node in graph.node if _reads(node, opened.keys() | constants)]
    for value, _ in opened.values():
        graph.input.remove(value)
    path = with_inputs = folder / "float.onnx"
    save_model(model, path)
    if opened:
        with_inputs = folder / "inputs.onnx"
        save_model(_without_defaults(onnx.load(path), opened), with_inputs)
    return Prepared(
        path=path, with_inputs=with_inputs, opened=tuple(opened.values()), kept=tuple(kept), moved=moved
    )  # fmt: skip


def _without_defaults(
    model: onnx.ModelProto, opened: Mapping[str, tuple[onnx.ValueInfoProto, onnx.TensorProto]]
) -> onnx.ModelProto:
    """The same model, with inputs in place of their defaults."""
    kept = [tensor for tensor in model.graph.initializer if tensor.name not in opened]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    model.graph.input.extend(value for value, _ in opened.values())
    return model


def restore_defaults(model: onnx.ModelProto, prepared: Prepared) -> None:
    """Give a quantized model the inputs for adapters, and their defaults, as the source has them."""
    inputs = {value.name for value in model.graph.input}
    values = {tensor.name for tensor in model.graph.initializer}
    for value, tensor in prepared.opened:
        if value.name not in inputs:
            model.graph.input.append(value)
        if value.name not in values:
            model.graph.initializer.append(tensor)


def is_adapter(name: str) -> bool:
    """Whether a tensor is a factor of an adapter."""
    return name.endswith((".adapter_A", ".adapter_B"))


def _reads(node: onnx.NodeProto, names: Set[str]) -> bool:
    inner = [one for attribute in node.attribute if attribute.HasField("g") for one in find_graphs(attribute.g)]
    read = {*node.input, *(name for graph in inner for one in graph.node for name in one.input)}
    return not read.isdisjoint(names) or any(name.endswith(_ADAPTED) for name in read)
