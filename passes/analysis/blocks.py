"""Find the blocks that a model repeats, and number its layers, from the graph alone.

The operators of a graph are in the order in which they ran, so repeated blocks are equal segments of that order. A
block begins where the fewest values cross from the one before it. Neighboring blocks must have the same *graph hash*
(same operators, shapes and dtypes, same edges inside), and each must feed the next. Operators that depend on look-ups
only, such as a bias that the first layer computes for all layers, are ignored. Time is linear in the number of nodes.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from passes.analysis.dataflow import operator_name
from passes.analysis.provenance import PRODUCTS, is_convolution
from passes.analysis.weight_uses import GraphUse, WeightUse

#: Number of distances to try as the length of a block, and of equal operators to look back at for each distance.
_MOST_CANDIDATES = 16
_MOST_BETWEEN = 8

Block = tuple[Node, ...]


def find_repeated_blocks(graph: Graph) -> list[tuple[Block, ...]]:
    """Runs of two or more equal blocks, each with a weight and feeding the next, in graph order.

    The last block of a run may lack its end, up to half of the block, as where each block but the last is followed by
    a norm.
    """
    sequence = _Sequence(_find_spine(graph))
    found: list[tuple[Block, ...]] = []
    todo = [(0, len(sequence.nodes))]
    while todo:
        start, end = todo.pop()
        stretch = _find_stretch(sequence, start, end)
        if stretch is None:
            continue
        begin, stop, period = stretch
        begin = _align(sequence.nodes, begin, stop, period)
        blocks = [tuple(sequence.nodes[at : min(at + period, stop)]) for at in range(begin, stop, period)]
        blocks = [block for block in blocks if len(block) > period // 2]
        found += _split_by_hash(blocks)
        todo += [(start, begin), (begin + sum(map(len, blocks)), end)]
    return sorted(found, key=lambda run: run[0][0])


def find_layer_numbers(uses: Mapping[str, Sequence[WeightUse]]) -> dict[str, int]:
    """The number of the block that uses each weight, by the weight's name.

    Blocks are numbered from 0 in each run of equal blocks. Weights outside blocks have no number.

    Args:
        uses: every use of each weight, by its first qualified name.
    """
    by_graph: dict[GraphModule, dict[Node, str]] = {}
    for name, found in uses.items():
        for use in found:
            if isinstance(use, GraphUse):
                outer = use.regions[0] if use.regions else use.node
                by_graph.setdefault(use.graph_module, {})[outer] = name
    numbers: dict[str, int] = {}
    for names in _find_blocks_inside(by_graph):
        for number, own in enumerate(names):
            for name in own:
                numbers.setdefault(name, number)
    return numbers


def hash_block(block: Sequence[Node]) -> str:
    """A hash that is equal for blocks with the same operators, shapes and dtypes and the same edges inside."""
    places = {node: place for place, node in enumerate(block)}
    edges = [(_describe(node), [places.get(source, -1) for source in node.all_input_nodes]) for node in block]
    return hashlib.sha256(repr(edges).encode()).hexdigest()


def _find_blocks_inside(by_graph: Mapping[GraphModule, Mapping[Node, str]]) -> Iterator[list[list[str]]]:
    """For each run of equal blocks in a graph, the names of the weights of each block."""
    runs = {graph: find_repeated_blocks(graph) for graph in {graph_module.graph for graph_module in by_graph}}
    for graph_module, names in by_graph.items():
        for run in runs[graph_module.graph]:
            yield [[names[node] for node in block if node in names] for block in run]


class _Sequence:
    """Operators in order; for each, a number that equal ones share, and whether it multiplies with a weight."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        interned: dict[Hashable, int] = {}
        self.nodes = nodes
        self.numbers = [interned.setdefault(_describe(node), len(interned)) for node in nodes]
        self.weighted = [_is_weighted(node) for node in nodes]
        self.places = {node: place for place, node in enumerate(nodes)}

    def is_chain(self, begin: int, period: int) -> bool:
        """Whether the first of two or more equal segments has a weight and feeds the second."""
        second = range(begin + period, begin + 2 * period)
        users = (self.places.get(user) for node in self.nodes[begin : begin + period] for user in node.users)
        return any(self.weighted[begin : begin + period]) and any(place in second for place in users if place)


def _find_spine(graph: Graph) -> list[Node]:
    """The operators that compute tensors and are, or depend on, a product or a convolution with a weight."""
    spine: dict[Node, None] = {}
    for node in graph.nodes:
        value = node.meta.get("val")
        is_tensor = value is None or isinstance(value, (torch.Tensor, tuple, list))
        behind = any(source in spine for source in node.all_input_nodes)
        if node.op == "call_function" and is_tensor and (behind or _is_weighted(node)):
            spine[node] = None
    return list(spine)


def _is_weighted(node: Node) -> bool:
    is_product = operator_name(node) in PRODUCTS or "grouped_mm" in operator_name(node) or is_convolution(node)
    return is_product and any(_is_weight(source) for source in node.all_input_nodes)


def _is_weight(source: Node) -> bool:
    while source.op == "call_function" and len(source.all_input_nodes) == 1:
        (source,) = source.all_input_nodes
    return source.op == "get_attr"


def _describe(node: Node) -> tuple[Any, ...]:
    weights = tuple(_shape(source) for source in node.all_input_nodes if source.op == "get_attr")
    return (str(node.target), _shape(node), weights)


def _shape(node: Node) -> tuple[Any, ...]:
    """Dtype and sizes of a tensor; symbolic sizes, whose names may differ between blocks, are replaced by ``?``."""
    value = node.meta.get("val")
    if isinstance(value, (tuple, list)):
        return (len(value),)
    if not isinstance(value, torch.Tensor):
        return ()
    return (str(value.dtype), *(size if isinstance(size, int) else "?" for size in value.shape))  # type: ignore[redundant-expr]


def _find_stretch(sequence: _Sequence, start: int, end: int) -> tuple[int, int, int] | None:
    """``(begin, stop, period)`` of the longest chain of equal segments between two places."""
    best: tuple[int, int, int] | None = None
    covered = 0
    for period in sorted(_find_periods(sequence, start, end)):
        begin, stop = _find_longest_run(sequence.numbers, start, end, period)
        length = stop - begin
        if length > covered and 2 * length > 3 * period and sequence.is_chain(begin, period):
            best, covered = (begin, stop, period), length
    return best


def _find_periods(sequence: _Sequence, start: int, end: int) -> list[int]:
    """The most frequent distances between equal operators with a weight: candidates for the length of a block."""
    seen: dict[int, list[int]] = {}
    distances: Counter[int] = Counter()
    for place in range(start, end):
        if sequence.weighted[place]:
            before = seen.setdefault(sequence.numbers[place], [])
            distances.update(place - other for other in before)
            before.append(place)
            del before[:-_MOST_BETWEEN]
    return [distance for distance, _ in distances.most_common(_MOST_CANDIDATES)]


def _find_longest_run(numbers: Sequence[int], start: int, end: int, period: int) -> tuple[int, int]:
    """``(begin, end)`` of the longest segment in which every operator equals the one a period later."""
    best, begin = (start, start), start
    for place in range(start, end - period):
        if numbers[place] != numbers[place + period]:
            begin = place + 1
        elif place + 1 + period - begin > best[1] - best[0]:
            best = (begin, place + 1 + period)
    return best


def _align(nodes: Sequence[Node], begin: int, stop: int, period: int) -> int:
    """The begin of the first block in a segment that may be longer than whole blocks: the fewest values cross there."""
    places = {node: place for place, node in enumerate(nodes[begin:stop])}
    crossing = [0] * (stop - begin + 1)
    for node, place in places.items():
        last = max((places.get(user, stop - begin) for user in node.users), default=place)
        crossing[place + 1] += 1
        if last + 1 < len(crossing):
            crossing[last + 1] -= 1
    for place in range(1, len(crossing)):
        crossing[place] += crossing[place - 1]
    rest = (stop - begin) % period
    slack = rest if 2 * rest <= period else 0
    return begin + min(range(slack + 1), key=lambda shift: (sum(crossing[shift : stop - begin + 1 : period]), shift))


def _split_by_hash(blocks: Sequence[Block]) -> Iterator[tuple[Block, ...]]:
    """Runs of blocks with equal hashes; a shorter block is compared with the beginning of the one before it."""
    run: list[Block] = []
    for block in blocks:
        if run and hash_block(block) != hash_block(run[-1][: len(block)]):
            if len(run) > 1:
                yield tuple(run)
            run = []
        run.append(block)
    if len(run) > 1:
        yield tuple(run)
