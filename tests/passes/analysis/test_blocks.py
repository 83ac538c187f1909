"""Layers are numbered from the graph alone, without their names."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.analysis.blocks import find_layer_numbers, find_repeated_blocks, hash_block
from passes.analysis.weight_uses import find_parameter_aliases, find_weight_uses
from passes.capture.calls import split_call
from passes.capture.capture import capture_call


class Block(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(torch.relu(self.up(self.norm(x))))
        return result


class Nameless(nn.Module):
    """Blocks of one or two kinds, with names that do not show their order."""

    def __init__(self, *hidden: int) -> None:
        super().__init__()
        self.order = [f"part_{'zyxwvutsrq'[place]}" for place in range(len(hidden))]
        self.start, self.end = nn.Linear(6, 8), nn.Linear(8, 3)
        for name, size in sorted(zip(self.order, hidden, strict=True)):
            self.add_module(name, Block(8, size))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.start(x))
        for name in self.order:
            x = self.get_submodule(name)(x)
        result: Tensor = self.end(x)
        return result


def number(model: nn.Module, x: Tensor) -> dict[str, int]:
    graph = capture_call(model.eval(), split_call((x,), {})).graph_module
    return find_layer_numbers(find_weight_uses(graph, find_parameter_aliases(model)))


@pytest.mark.parametrize("depth", [2, 3, 7])
def test_equal_blocks_are_numbered_in_the_order_in_which_they_run(depth: int) -> None:
    model = Nameless(*[16] * depth)
    expected = {f"{name}.{part}.weight": i for i, name in enumerate(model.order) for part in ("up", "down")}
    assert number(model, torch.randn(2, 6)) == expected


def test_each_run_of_equal_blocks_counts_from_zero() -> None:
    model = Nameless(16, 16, 16, 32, 32)
    found = number(model, torch.randn(2, 6))
    assert [found[f"{name}.up.weight"] for name in model.order] == [0, 1, 2, 0, 1]
    assert "start.weight" not in found
    assert "end.weight" not in found


def test_blocks_that_differ_have_no_numbers() -> None:
    assert number(Nameless(16, 24, 32), torch.randn(2, 6)) == {}


def test_hashes_differ_for_other_shapes() -> None:
    def blocks(model: nn.Module) -> list[str]:
        graph = capture_call(model.eval(), split_call((torch.randn(2, 6),), {})).graph_module.graph
        return [hash_block(block) for run in find_repeated_blocks(graph) for block in run]

    first, second, *rest = blocks(Nameless(16, 16, 16))
    assert first == second
    assert all(hash_ == first for hash_ in rest)
    assert set(blocks(Nameless(32, 32, 32))).isdisjoint({first})
