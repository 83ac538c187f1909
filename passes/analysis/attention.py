"""Find attention in a graph, in any notation, and the operators that make its queries, keys and values.

    scaled_dot_product_attention(q, k, v)                       as one operator
    softmax(mask(q · kᵀ)) · v                                   as matmul, bmm, baddbmm or einsum
    irfft(rfft(q) ⊙ conj(rfft(k)))                              autocorrelation (Autoformer); values are not matched

Both products must be of two values that depend on inputs, so a softmax over classes or experts does not match.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Iterator

from torch.fx import Graph, Node

from passes.analysis.dataflow import operator_name
from passes.analysis.provenance import ATTENTIONS, PRODUCTS, ProvenanceTrace

_SOFTMAXES = {"softmax", "_softmax", "_safe_softmax"}
_INVERSE_TRANSFORMS = {"fft_irfft"}
_CONJUGATES = {"conj", "_conj", "resolve_conj"}
#: Most nodes to search between the product of queries and keys, the softmax, and the product with the values.
_WINDOW = 96


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attention:
    """One attention.

    Attributes:
        node: the operator that gives its result.
        operands: the operators that make its ``query``, ``key`` and ``value``, by these names.
    """

    node: Node
    operands: dict[str, set[Node]]


def find_attentions(graph: Graph, trace: ProvenanceTrace) -> list[Attention]:
    """Every attention of the graph, in graph order."""
    found: list[Attention] = []
    for node in graph.nodes:
        name = operator_name(node)
        if name in ATTENTIONS:
            arguments = [*node.args, *(node.kwargs[k] for k in ("query", "key", "value") if k in node.kwargs)]
            found.append(_describe(node, *arguments[:3], trace=trace))
        elif name in _SOFTMAXES:
            found += _match_softmax(node, trace)
        elif name in _INVERSE_TRANSFORMS:
            found += _match_correlation(node, trace)
    return found


def _describe(node: Node, *operands: object, trace: ProvenanceTrace) -> Attention:
    named = zip(("query", "key", "value"), operands, strict=True)
    return Attention(node=node, operands={name: trace.source_nodes(value) for name, value in named})


def _match_softmax(softmax: Node, trace: ProvenanceTrace) -> Iterator[Attention]:
    scores = _find_scores(softmax, trace)
    result = _find_result(softmax, trace)
    if scores is not None and result is not None:
        query, key = _order_operands(scores)
        value = next(v for v in _operands(result) if not _depends_on(v, softmax))
        yield _describe(result, query, key, value, trace=trace)


def _match_correlation(inverse: Node, trace: ProvenanceTrace) -> Iterator[Attention]:
    (spectrum,) = inverse.all_input_nodes[:1]
    conjugates = [v for v in spectrum.all_input_nodes if operator_name(v) in _CONJUGATES]
    others = [v for v in spectrum.all_input_nodes if v not in conjugates]
    if operator_name(spectrum) == "mul" and len(conjugates) == len(others) == 1:
        operands = {"query": trace.source_nodes(others[0]), "key": trace.source_nodes(conjugates[0])}
        yield Attention(node=inverse, operands=operands)


def _find_scores(softmax: Node, trace: ProvenanceTrace) -> Node | None:
    """The first product of queries and keys before the softmax; later ones add relative positions."""
    products = _search(softmax, lambda node: node.all_input_nodes, lambda node: _is_product(node, trace))
    return min(products, default=None)


def _find_result(softmax: Node, trace: ProvenanceTrace) -> Node | None:
    products = _search(softmax, lambda node: list(node.users), lambda node: _is_product(node, trace))
    return next((p for p in products if sum(not _depends_on(v, softmax) for v in _operands(p)) == 1), None)


def _search(
    start: Node, neighbors: Callable[[Node], Iterable[Node]], is_wanted: Callable[[Node], bool]
) -> Iterator[Node]:
    """The wanted nodes by breadth-first search, which stops at them and after :data:`_WINDOW` nodes."""
    seen, queue = {start}, deque(neighbors(start))
    while queue and len(seen) < _WINDOW:
        node = queue.popleft()
        if node in seen:
            continue
        seen.add(node)
        if is_wanted(node):
            yield node
        else:
            queue.extend(neighbors(node))


def _depends_on(value: Node, softmax: Node) -> bool:
    return value is softmax or softmax in _search(value, lambda node: node.all_input_nodes, lambda n: n is softmax)


def _is_product(node: Node, trace: ProvenanceTrace) -> bool:
    """Whether it multiplies two values that both depend on inputs."""
    if operator_name(node) not in PRODUCTS or trace.kinds.get(node) != "product":
        return False
    return len([value for value in _operands(node) if trace.provenance[value]]) == 2


def _operands(product: Node) -> list[Node]:
    """The two factors of a product, without the summand of baddbmm and addmm."""
    skipped = 1 if operator_name(product) in ("baddbmm", "addmm") else 0
    if operator_name(product) == "einsum":
        return [value for value in product.args[1] if isinstance(value, Node)]  # type: ignore[union-attr]
    return [value for value in product.args[skipped : skipped + 2] if isinstance(value, Node)]


def _order_operands(scores: Node) -> tuple[Node, Node]:
    """``(query, key)``: the softmax runs over keys, which are the last dimension of the scores."""
    first, second = _operands(scores)
    if operator_name(scores) == "einsum":
        inputs, result = str(scores.args[0]).replace(" ", "").split("->")
        if result[-1] in inputs.split(",")[0]:
            return second, first
    return first, second
