"""Weight-use analysis: follow every weight of a captured graph to the operators that use it.

A weight is followed through transposes, casts and slices, and into the bodies of ``no_grad`` and autocast regions,
until an operator computes with it. Whether it can have an adapter is decided in :mod:`passes.planning.find_sites`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node

from passes.analysis.dataflow import find_nodes_reaching_output, is_in_place, operator_name
from passes.capture.capture import MODULE_PREFIX
from passes.compat import SET_GRAD_ENABLED, higher_order_name
from passes.operators import NAMES_WITH_SUMMAND, PRODUCT_FORMS, PRODUCT_NAMES

aten = torch.ops.aten

_TRANSPOSES = {aten.t.default, aten.mT.default, aten.adjoint.default}
_SAME_VALUE = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
}
_PARTS = {
    aten.numpy_T.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.narrow.default,
    aten.chunk.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.unbind.int,
    aten.view.default,
    aten.reshape.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.permute.default,
    aten.transpose.int,
}
_CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default}
_CONVOLUTIONS |= {aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding}
#: Regions whose body runs exactly once; its inputs are the operands after the body.
_SINGLE_BODY_REGIONS = {"wrap_with_set_grad_enabled", "wrap_with_autocast", "tag_activation_checkpoint"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class WeightUse:
    """One operation that computes with a weight, in a graph or in Python code.

    Attributes:
        op: its name, such as ``linear``, ``matmul`` or ``embedding``.
        transposed: whether it computes ``x @ W`` (weight stored [in, out]) and not ``x @ W.T``.
        is_linear: whether the operator is a matrix product with the weight or a part of it.
        has_gradient: whether the weight gets a gradient from it; false inside ``no_grad``.
        reaches_output: whether an output depends on it.
        is_copied: whether values of the weight are written into another tensor in place.
    """

    op: str
    transposed: bool = False
    is_linear: bool = False
    has_gradient: bool = True
    reaches_output: bool = True
    is_copied: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraphUse(WeightUse):
    """A use of a weight in a captured graph.

    Attributes:
        graph_module: the captured graph; several may share one graph over different weights.
        node: the operator.
        source: the node of the whole weight in the outermost graph.
        regions: the region calls that lead from the outermost graph to ``node``, outermost first.
        operand: the position of ``x`` among the operator's arguments where it is a product, a stack, a look-up or
            a convolution with the whole weight, so that an adapter can run on activations; else ``None``.
        kind: ``product`` (``x @ W`` or ``x @ W.T``), ``stack`` (the same for each matrix of a stack), ``lookup``
            (rows of W) or ``convolution``.
    """

    graph_module: GraphModule
    node: Node
    source: Node
    regions: tuple[Node, ...] = ()
    operand: int | None = None
    kind: str = "product"

    @property
    def activation(self) -> Node | None:
        """The node ``x`` in the present graph; inserting an adapter before this one may have replaced it."""
        x = None if self.operand is None else self.node.args[self.operand]
        return x if isinstance(x, Node) else None


@dataclasses.dataclass(frozen=True)
class _Path:
    """The present state of a walk from a weight to its uses."""

    graph_module: GraphModule
    value: Node
    source: Node
    regions: tuple[Node, ...] = ()
    transposed: bool = False
    whole: bool = True
    has_gradient: bool = True


def find_parameter_aliases(module: nn.Module) -> dict[str, str]:
    """Every qualified parameter name of ``module`` → the first name of the same Parameter."""
    return find_first_names(module.named_parameters(remove_duplicate=False))


def find_first_names(named: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """Every name → the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in named}


def find_weight_uses(graph_module: GraphModule, aliases: Mapping[str, str]) -> dict[str, list[GraphUse]]:
    """Uses of every parameter of two or more dimensions, by its first qualified name, in graph order."""
    uses: dict[str, list[GraphUse]] = {}
    reaching: dict[Graph, set[Node]] = {}
    without_grad = _find_without_grad(graph_module.graph)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        name = aliases.get(str(node.target).removeprefix(MODULE_PREFIX))
        if name is None or "adapter_site" in node.meta:
            continue
        parameter = graph_module.get_parameter(str(node.target))
        if parameter.dim() >= 2:
            found = _walk(graph_module, _Path(graph_module, node, node), reaching)
            cut = (dataclasses.replace(u, has_gradient=False) if u.node in without_grad else u for u in found)
            uses.setdefault(name, []).extend(cut)
    return uses


def _find_without_grad(graph: Graph) -> set[Node]:
    """The nodes that ran without gradients, in a graph that records ``set_grad_enabled``."""
    is_on, found = True, set()
    for node in graph.nodes:
        if node.target is SET_GRAD_ENABLED:
            is_on = bool(node.args[0])
        elif not is_on:
            found.add(node)
    return found


def _walk(owner: GraphModule, path: _Path, reaching: dict[Graph, set[Node]]) -> Iterator[GraphUse]:
    for user in path.value.users:
        if user.meta.get("adapter_site") is not None:
            continue
        onward = _follow(user, path)
        if onward is not None:
            yield from _walk(owner, onward, reaching)
            continue
        body = _find_body(owner, user)
        if body is None:
            yield _describe(user, path, reaching)
        else:
            yield from _enter(body, user, path, reaching)


def _follow(user: Node, path: _Path) -> _Path | None:
    """The walk after ``user``, if that only casts, transposes, slices or reshapes the weight; else ``None``."""
    target = user.target
    if not user.args or user.args[0] is not path.value:
        return None
    if target in _SAME_VALUE:
        return dataclasses.replace(path, value=user)
    if target in _TRANSPOSES or _swaps_two_dimensions(user):
        return dataclasses.replace(path, value=user, transposed=not path.transposed)
    if target in _PARTS or getattr(target, "__name__", "") == "getitem":
        return dataclasses.replace(path, value=user, whole=False)
    return None


def _swaps_two_dimensions(user: Node) -> bool:
    """Whether it swaps the two dimensions of a matrix, or of each of a stack of matrices."""
    dims = _count_dims(user.args[0])
    if dims not in (2, 3):
        return False
    last, before = dims - 1, dims - 2
    if user.target is aten.numpy_T.default:
        return last == 1
    if user.target is aten.transpose.int:
        return {d % dims for d in user.args[1:]} == {last, before}  # type: ignore[operator]
    if user.target is not aten.permute.default:
        return False
    return [d % dims for d in user.args[1]] == [*range(before), last, before]  # type: ignore[union-attr,operator]


def _count_dims(value: Any) -> int:
    """The number of dimensions of a tensor; 0 if it is unknown or the value is a list, as of a chunked weight."""
    example = value.meta.get("val") if isinstance(value, Node) else None
    return example.dim() if isinstance(example, torch.Tensor) else 0


def _find_body(owner: GraphModule, user: Node) -> GraphModule | None:
    """The body of a region that runs once, unless two calls share it."""
    if higher_order_name(user.target) not in _SINGLE_BODY_REGIONS:
        return None
    reference = find_body_reference(user)
    if len([n for n in owner.graph.find_nodes(op="get_attr", sort=False) if n.target == reference.target]) > 1:
        return None
    body = owner.get_submodule(str(reference.target))
    return body if isinstance(body, GraphModule) and len(reference.users) == 1 else None


def find_body_reference(region: Node) -> Node:
    """The ``get_attr`` node of a region's body; the region's operands come after it."""
    return next(arg for arg in region.args if isinstance(arg, Node) and _is_graph_reference(arg))


def _is_graph_reference(node: Node) -> bool:
    owner = node.graph.owning_module
    return node.op == "get_attr" and owner is not None and isinstance(_lookup(owner, str(node.target)), GraphModule)


def _lookup(owner: nn.Module, path: str) -> object:
    value: object = owner
    for part in path.split("."):
        value = getattr(value, part, None)
    return value


def _enter(body: GraphModule, region: Node, path: _Path, reaching: dict[Graph, set[Node]]) -> Iterator[GraphUse]:
    start = region.args.index(find_body_reference(region)) + 1
    placeholders = body.graph.find_nodes(op="placeholder")
    stops_gradient = higher_order_name(region.target) == "wrap_with_set_grad_enabled" and region.args[0] is False
    for operand, inner in zip(region.args[start:], placeholders, strict=True):
        if operand is path.value:
            onward = dataclasses.replace(
                path,
                value=inner,
                regions=(*path.regions, region),
                has_gradient=path.has_gradient and not stops_gradient,
            )
            yield from _walk(body, onward, reaching)


def _describe(user: Node, path: _Path, reaching: dict[Graph, set[Node]]) -> GraphUse:
    op = operator_name(user)
    operand, stored_in_out = _match_product(user, path.value)
    kind = "product"
    if _match_stack(user, path.value):
        operand, stored_in_out, kind = 0, True, "stack"
    elif operand is None and not path.transposed:
        operand, kind = _match_lookup(user, path.value)
    chain = (*path.regions, user)
    return GraphUse(
        graph_module=path.graph_module,
        node=user,
        op=op,
        source=path.source,
        regions=path.regions,
        operand=operand if path.whole else None,
        kind=kind,
        transposed=stored_in_out != path.transposed,
        is_linear=op in PRODUCT_NAMES and not (op in NAMES_WITH_SUMMAND and user.args[0] is path.value),
        has_gradient=path.has_gradient,
        reaches_output=all(_reaches_output(node, reaching) for node in chain),
        is_copied=is_in_place(user) and user.args[0] is not path.value,
    )


def _match_product(user: Node, weight: Node) -> tuple[int | None, bool]:
    """``(position of x, weight is stored [in, out])`` if ``user`` multiplies ``x`` by the whole 2-D weight."""
    form = PRODUCT_FORMS.get(user.target)
    if form is None or user.args[form.weight] is not weight or user.kwargs.get("alpha", 1) != 1:
        return None, False
    once = sum(argument is weight for argument in user.args) == 1
    is_product = isinstance(user.args[form.x], Node) and _count_dims(weight) == 2 and once
    return (form.x, form.is_transposed) if is_product else (None, False)


def _match_stack(user: Node, weight: Node) -> bool:
    """Whether ``user`` multiplies each matrix of a stack of x by one of the weight.

    ``_grouped_mm`` is excluded: its kernels need rows of a multiple of 16 bytes, which a rank rarely has.
    """
    is_product = user.target in (aten.bmm.default, aten.matmul.default) and user.args[1] is weight is not user.args[0]
    return is_product and _count_dims(weight) == 3 and _count_dims(user.args[0]) >= 2


def _match_lookup(user: Node, weight: Node) -> tuple[int | None, str]:
    """``(position of x, kind)`` if ``user`` looks up rows of the weight, or is a convolution without groups."""
    if user.kwargs:
        return None, "product"
    if user.target is aten.embedding.default and user.args[0] is weight:
        scales_by_frequency = len(user.args) > 3 and user.args[3]
        return (None, "product") if scales_by_frequency else (1, "lookup")
    groups = user.args[6] if len(user.args) > 6 else 1
    if user.target in _CONVOLUTIONS and user.args[1] is weight and user.args[0] is not weight and groups == 1:
        return 0, "convolution"
    return None, "product"


def _reaches_output(node: Node, reaching: dict[Graph, set[Node]]) -> bool:
    if node.graph not in reaching:
        reaching[node.graph] = find_nodes_reaching_output(node.graph)
    return node in reaching[node.graph]
