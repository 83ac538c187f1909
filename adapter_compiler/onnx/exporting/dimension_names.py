"""Give the open dimensions of a file names that say what they are: ``batch``, ``sequence``, ``height``.

Exporters call them ``s87``. Dimensions that the model takes in equal sizes only get one name. The names are those of
the file's declarations; onnxruntime shows them to whoever asks what the file takes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

import onnx

from adapter_compiler.errors import ExportError
from adapter_compiler.onnx.translation.varying_sizes import VaryingSizes
from adapter_compiler.onnx.verification.sizes import Place, find_places, size_of
from passes.capture.calls import ModuleCall

_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z_0-9]*")

#: Spatial dimensions of images and volumes, by the number of dimensions.
_SPATIAL: Mapping[int, Sequence[str]] = {4: ("height", "width"), 5: ("depth", "height", "width")}


def name_dimensions(draft: Path, sizes: VaryingSizes, inputs: Sequence[str]) -> dict[str, tuple[int | str, ...]]:
    """Rename the open dimensions of a file, in place.

    Args:
        draft: the file.
        sizes: which sizes of the example's dimensions the model takes.
        inputs: names for the tensors of the example, of which the file may lack some.

    Returns:
        By input of the file, its sizes; those that are open by their names.
    """
    model = onnx.load(draft, load_external_data=False)
    symbols = _find_symbols(model.graph, inputs)
    every = list(_find_declared(model.graph))
    others = {token for dimension in every for token in _SYMBOL.findall(dimension.dim_param)} - set(symbols.values())
    names: dict[str, str] = {}
    in_file = {value.name for value in model.graph.input}
    left_out = {number for number, name in enumerate(inputs) if name not in in_file}
    for group in _group_symbols(symbols, sizes, left_out):
        name = _choose_name(group, sizes, inputs, {*names.values(), *others})
        names |= dict.fromkeys((symbols[place] for place in group), name)
    rename: Callable[[re.Match[str]], str] = lambda found: names.get(found[0], found[0])  # noqa: E731
    for dimension in every:
        if dimension.dim_param:
            dimension.dim_param = _SYMBOL.sub(rename, dimension.dim_param)
    onnx.save(model, draft)
    declared = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    return {name: tuple(d.dim_param or d.dim_value for d in declared[name]) for name in inputs if name in declared}


def set_dimension_names(draft: Path, names: Mapping[str, Sequence[str | None]]) -> dict[str, tuple[int | str, ...]]:
    """Give open dimensions of inputs and outputs these names, in place.

    Args:
        draft: the file.
        names: by input and output, the name of each dimension; ``None`` for one that has a number.

    Returns:
        By input of the file, its sizes; those that are open by their names.

    Raises:
        ExportError: a dimension that must be open has a number.
    """
    model = onnx.load(draft, load_external_data=False)
    renamed: dict[str, str] = {}
    for value in (*model.graph.input, *model.graph.output):
        dimensions = value.type.tensor_type.shape.dim
        for number, (dimension, name) in enumerate(zip(dimensions, names.get(value.name, ()), strict=False)):
            if name is None:
                continue
            if dimension.HasField("dim_value"):
                raise ExportError(
                    f"dimension {number} of {value.name} is {dimension.dim_value} in the exported file, expected it to "
                    f"be open ({name}): the model's code fixes it"
                )
            renamed.setdefault(dimension.dim_param, name)
            dimension.dim_param = name
    for dimension in _find_declared(model.graph):
        if dimension.dim_param:
            dimension.dim_param = _SYMBOL.sub(lambda found: renamed.get(found[0], found[0]), dimension.dim_param)
    onnx.save(model, draft)
    return {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in model.graph.input
        if value.name in names
    }


def _find_symbols(graph: onnx.GraphProto, inputs: Sequence[str]) -> dict[Place, str]:
    """The symbol of each open dimension of the inputs, the first dimensions first; sums and products are left out."""
    numbers = {name: number for number, name in enumerate(inputs)}
    found = {
        Place(numbers[value.name], number): dimension.dim_param
        for value in graph.input
        if value.name in numbers
        for number, dimension in enumerate(value.type.tensor_type.shape.dim)
        if _SYMBOL.fullmatch(dimension.dim_param)
    }
    return dict(sorted(found.items(), key=lambda pair: (pair[0].dimension, pair[0].tensor)))


def _group_symbols(
    symbols: Mapping[Place, str], sizes: VaryingSizes, left_out: Collection[int]
) -> list[frozenset[Place]]:
    """Dimensions of one symbol, and those of further symbols of the same number and size that only vary together."""
    groups: list[frozenset[Place]] = []
    for symbol in dict.fromkeys(symbols.values()):
        places = frozenset(place for place, one in symbols.items() if one == symbol)
        partner = next((group for group in groups if _are_one(group, places, sizes, left_out)), None)
        if partner is None:
            groups.append(places)
        else:
            groups[groups.index(partner)] = partner | places
    return groups


def _are_one(first: frozenset[Place], second: frozenset[Place], sizes: VaryingSizes, left_out: Collection[int]) -> bool:
    """Whether the model takes other sizes of both together, but not of the second alone.

    Labels that are left out of the file may have to follow in either case. Rows of a mask of ones are ignored by some
    models, so those of the batch belong to it unless they change the shape of an output.
    """
    kinds, others = ({(place.dimension, size_of(sizes.call, place)) for place in places} for places in (first, second))
    if kinds != others:
        return False
    follow = frozenset(
        place
        for place in find_places(sizes.call)
        if place.tensor in left_out and (place.dimension, size_of(sizes.call, place)) in kinds
    )
    both = first | second
    if first & sizes.batch and second & sizes.batch and not sizes.is_visible(second):
        return True
    is_alone = sizes.accepts(second) or sizes.accepts(second | follow)
    return not is_alone and (sizes.accepts(both) or sizes.accepts(both | follow))


def _choose_name(group: Collection[Place], sizes: VaryingSizes, inputs: Sequence[str], taken: Collection[str]) -> str:
    place = min(group, key=lambda one: (one.dimension, one.tensor))
    name = "batch" if sizes.batch & set(group) else _describe(place, sizes.call)
    return next(one for one in _spellings(name, inputs[place.tensor]) if one not in taken)


def _spellings(name: str, owner: str) -> Iterator[str]:
    yield name
    own = f"{re.sub(r'[^A-Za-z_0-9]', '_', owner)}_{name}"
    yield own
    count = 2
    while True:
        yield f"{own}_{count}"
        count += 1


def _describe(place: Place, call: ModuleCall) -> str:
    """What a dimension usually is: of images height and width, of ids and masks the sequence."""
    tensor, number = call.tensors[place.tensor], place.dimension
    spatial = _SPATIAL.get(tensor.dim(), ())
    first = tensor.dim() - len(spatial)
    if tensor.is_floating_point() and spatial and number >= first:
        return spatial[number - first]
    if tensor.dim() == 3:
        return "length" if number == 2 else "sequence"
    if number == 0:
        return "rows"
    return "length" if tensor.is_floating_point() else "sequence"


def _find_declared(graph: onnx.GraphProto) -> Iterator[onnx.TensorShapeProto.Dimension]:
    """The dimensions that a graph and the graphs in its nodes declare."""
    for value in (*graph.input, *graph.output, *graph.value_info):
        yield from value.type.tensor_type.shape.dim
    for node in graph.node:
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _find_declared(inner)
