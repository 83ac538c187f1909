"""Fix the dimensions of a file's inputs for which the model takes one size only.

torch.export leaves a dimension open where its own code works at other sizes, also if the model refuses all of these: an
image of 8 × 8 that is flattened for a layer of 64 inputs could be one of 4 × 16. Such dimensions get numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import onnx

from adapter_compiler.onnx.translation.fallbacks import WrittenDraft
from adapter_compiler.onnx.verification.sizes import Bounds, Place, size_of
from passes.capture.calls import ModuleCall
from passes.capture.capture import DimensionBound


def close_sizes(
    draft: Path, written: WrittenDraft, call: ModuleCall, inputs: Sequence[str], places: Collection[Place]
) -> WrittenDraft:
    """Give dimensions of inputs, and others of the same symbol, the example's sizes; edits the file's declarations.

    Args:
        draft: the file; edited in place.
        written: what is known of it.
        call: the example.
        inputs: the names of the file's inputs, in the order of the call's tensors.
        places: the dimensions; those of one symbol are all among them.

    Returns:
        The same with bounds that say so.
    """
    if not places:
        return written
    model = onnx.load(draft, load_external_data=False)
    wanted = {(inputs[place.tensor], place.dimension): size_of(call, place) for place in places}
    symbols: dict[str, int] = {}
    for value in model.graph.input:
        for number, dimension in enumerate(value.type.tensor_type.shape.dim):
            if (value.name, number) in wanted:
                symbols[dimension.dim_param] = wanted[value.name, number]
                dimension.dim_value = wanted[value.name, number]
    symbols.pop("", None)
    for dimension in _find_dimensions(model.graph):
        if dimension.dim_param in symbols:
            dimension.dim_value = symbols[dimension.dim_param]
    onnx.save(model, draft)
    return dataclasses.replace(written, bounds=_close_bounds(written.bounds, call, places))


def _find_dimensions(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from value.type.tensor_type.shape.dim


def _close_bounds(bounds: Bounds, call: ModuleCall, places: Collection[Place]) -> list[list[DimensionBound]]:
    closed = [list(dimensions) for dimensions in bounds]
    for place in places:
        size = size_of(call, place)
        closed[place.tensor][place.dimension] = DimensionBound(symbol=None, least=size, greatest=size)
    return closed
