"""Recognize a base layer: a product of activations with a weight, with or without bias."""

from __future__ import annotations

import dataclasses

import torch
from torch.fx import Node

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Product:
    """A base layer: x Wᵀ + b, or x W + b if W is stored [in, out]."""

    x: object
    weight: Node
    bias: Node | None
    is_transposed: bool


def match_product(node: Node) -> Product | None:
    """The base layer that a node is. What was matched before insertion says that W is 2-D and x is not W."""
    if node.target is aten.linear.default:
        x, weight, *rest = node.args
        is_transposed, bias = False, rest[0] if rest else None
    elif node.target in (aten.mm.default, aten.matmul.default):
        (x, weight), bias, is_transposed = node.args, None, True
    elif node.target is aten.addmm.default and not node.kwargs and _is_vector(node.args[0]):
        (bias, x, weight), is_transposed = node.args, True
    else:
        return None
    if not isinstance(weight, Node) or not (bias is None or isinstance(bias, Node)):
        return None
    return Product(x, weight, bias, is_transposed)


def _is_vector(value: object) -> bool:
    example = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(example, torch.Tensor) and example.dim() == 1
