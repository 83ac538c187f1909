"""Recognize a base layer: a product of activations with a weight, with or without bias.

For the passes that rewrite such layers. What each weight of a graph is used for is found in
:mod:`passes.analysis.weight_uses`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.fx import Node

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Product:
    """A base layer: x Wᵀ + b, or x W + b if W is stored [in, out].

    Attributes:
        x: the activations, [..., in].
        weight: W, [out, in], or [in, out] if ``is_transposed``.
        bias: b, [out], if there is one.
        is_transposed: whether W is stored [in, out].
    """

    x: object
    weight: Node
    bias: Node | None
    is_transposed: bool


@dataclasses.dataclass(frozen=True)
class ProductForm:
    """Where an operator that multiplies activations by a matrix has its operands.

    Attributes:
        x: position of the activations.
        weight: position of W.
        bias: position of b; ``None`` where the operator has none.
        is_transposed: whether W is stored [in, out].
    """

    x: int
    weight: int
    bias: int | None
    is_transposed: bool


#: Products with a whole 2-D weight, the one table that says which operators they are.
PRODUCT_FORMS: Mapping[object, ProductForm] = {
    aten.linear.default: ProductForm(x=0, weight=1, bias=2, is_transposed=False),
    aten.matmul.default: ProductForm(x=0, weight=1, bias=None, is_transposed=True),
    aten.mm.default: ProductForm(x=0, weight=1, bias=None, is_transposed=True),
    aten.addmm.default: ProductForm(x=1, weight=2, bias=0, is_transposed=True),
}

#: Names of all operators whose result is a sum of products of entries of a weight with entries of another operand.
PRODUCT_NAMES = frozenset(
    {"linear", "matmul", "mm", "addmm", "mv", "bmm", "baddbmm", "einsum", "tensordot", "_grouped_mm"}
)

#: Those of them whose first argument is a summand and not a factor.
NAMES_WITH_SUMMAND = frozenset({"addmm", "baddbmm"})


def match_product(node: Node) -> Product | None:
    """The base layer that a node computes, or ``None``; that W is 2-D and that x is not W is not checked here."""
    form = PRODUCT_FORMS.get(node.target)
    if form is None or node.kwargs:
        return None
    bias = node.args[form.bias] if form.bias is not None and len(node.args) > form.bias else None
    if bias is not None and form.bias == 0 and not _is_vector(bias):
        return None
    weight = node.args[form.weight]
    if not isinstance(weight, Node) or not (bias is None or isinstance(bias, Node)):
        return None
    return Product(node.args[form.x], weight, bias, form.is_transposed)


def _is_vector(value: object) -> bool:
    example = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(example, torch.Tensor) and example.dim() == 1
