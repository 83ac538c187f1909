"""Attention whose mask may hide everything gives zero, in torch as in the file."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import adapter_compiler as ac
from passes.export.zero_masked_rows import ZeroMaskedRowsPass


class Attention(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def make_inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 2, 4, 8) for _ in range(3))
    mask = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4).clone()
    mask[0, :, :, :2] = False
    return q, k, v, mask


def capture(*inputs: Tensor) -> GraphModule:
    graph_module = torch.export.export(Attention(), inputs, strict=True).module()
    assert isinstance(graph_module, GraphModule)
    return graph_module


def test_a_boolean_mask_gets_a_choice_after_the_attention() -> None:
    inputs = make_inputs()
    graph_module = capture(*inputs)
    expected = graph_module(*inputs)
    result = ZeroMaskedRowsPass()(graph_module)
    assert result.modified
    targets = [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]
    assert targets[-3:] == ["aten.scaled_dot_product_attention.default", "aten.any.dim", "aten.where.ScalarOther"]
    graph_module.recompile()
    assert torch.equal(graph_module(*inputs), expected)
    assert not ZeroMaskedRowsPass()(graph_module).modified


def test_a_mask_of_numbers_stays() -> None:
    q, k, v, mask = make_inputs()
    assert not ZeroMaskedRowsPass()(capture(q, k, v, mask.float())).modified


def test_the_file_gives_zero_as_pytorch_does(tmp_path: Path) -> None:
    inputs = make_inputs()
    assert not Attention()(*inputs)[0, :, :2].any()
    report = ac.export_onnx(Attention(), tmp_path / "attention.onnx", inputs)
    assert report.max_abs_error < 1e-5
