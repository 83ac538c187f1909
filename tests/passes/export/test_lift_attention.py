from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from passes.base import find_graph_modules
from passes.export.lift_attention import LiftAttentionPass

aten = torch.ops.aten


def rank_of(value: object) -> int:
    assert isinstance(value, Node)
    return int(value.meta["val"].dim())


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask, scale=0.3) * 2


CASES = [
    ((5, 8), (5, 7)),
    ((3, 5, 8), None),
    ((3, 5, 8), (5, 7)),
    ((3, 5, 8), (1, 5, 7)),
    ((3, 5, 8), (3, 5, 7)),
    ((2, 3, 4, 5, 8), (5, 7)),
    ((2, 3, 4, 5, 8), (4, 5, 7)),
    ((2, 3, 4, 5, 8), (3, 1, 5, 7)),
    ((2, 3, 4, 5, 8), (2, 1, 4, 5, 7)),
]


@pytest.mark.parametrize(("shape", "mask_shape"), CASES)
def test_other_ranks_become_four_dimensions(shape: tuple[int, ...], mask_shape: tuple[int, ...] | None) -> None:
    torch.manual_seed(0)
    query = torch.randn(shape)
    key, value = torch.randn(2, *shape[:-2], 7, shape[-1])
    mask = None if mask_shape is None else torch.randn(mask_shape)
    program = torch.export.export(Attention(), (query, key, value, mask), strict=False)
    result = LiftAttentionPass()(program.graph_module)
    assert result.modified
    calls = result.graph_module.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
    assert [rank_of(node.args[0]) for node in calls] == [4]
    expected = Attention()(query, key, value, mask)
    torch.testing.assert_close(program.module()(query, key, value, mask), expected)
    assert not LiftAttentionPass()(result.graph_module).modified


def test_the_graph_of_three_dimensions() -> None:
    x = torch.randn(3, 5, 8)
    program = torch.export.export(Attention(), (x, x.clone(), x.clone(), None), strict=False)
    LiftAttentionPass()(program.graph_module)
    assert [describe(node) for node in program.graph.nodes][4:-2] == [
        "unsqueeze(q, 0)",
        "unsqueeze(k, 0)",
        "unsqueeze(v, 0)",
        "scaled_dot_product_attention(unsqueeze_default, unsqueeze_default_1, unsqueeze_default_2, None)",
        "squeeze(scaled_dot_product_attention_default, 0)",
    ]


def describe(node: Node) -> str:
    return f"{getattr(node.target, '__name__', node.target)}{node.args}".replace(".default", "").replace(".dim", "")


def test_four_dimensions_are_not_changed() -> None:
    x = torch.randn(2, 3, 5, 8)
    program = torch.export.export(Attention(), (x, x.clone(), x.clone(), None), strict=False)
    assert not LiftAttentionPass()(program.graph_module).modified
    assert len(find_graph_modules(program.graph_module)) == 1
