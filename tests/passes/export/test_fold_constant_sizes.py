"""Sizes of inputs that can be one number only are written as that number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from passes.export.fold_constant_sizes import FoldConstantSizesPass


class Cell(nn.Module):
    """The size of the state is that of the weights, which torch.export finds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(4, 6)

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:
        return self.layer(x, (h, c))


def find_sizes(program: ExportedProgram) -> list[list[str]]:
    names = program.graph_signature.user_inputs
    inputs = [node for node in program.graph.find_nodes(op="placeholder") if node.name in names]
    return [["number" if isinstance(size, int) else "symbol" for size in node.meta["val"].shape] for node in inputs]


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_constant_sizes_become_numbers_and_others_stay() -> None:
    args = (torch.randn(5, 3, 4), torch.randn(1, 3, 6), torch.randn(1, 3, 6))
    dims = tuple({i: Dim.AUTO for i in range(3)} for _ in args)
    program = torch.export.export(Cell(), args, dynamic_shapes=dims, strict=False)
    assert "symbol" in {find_sizes(program)[1][2], find_sizes(program)[2][2]}
    before = str(program.graph)
    result = FoldConstantSizesPass()(program.graph_module)
    assert result.modified
    state = ["number", "symbol", "number"]
    assert find_sizes(program)[1:] == [state, state]
    assert str(program.graph) == before
    assert not FoldConstantSizesPass()(program.graph_module).modified
