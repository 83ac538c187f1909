"""RecognizeGeluPass: results equal to the separate operators; similar formulas are not rewritten."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from passes.capture.calls import split_call
from passes.capture.capture import capture_call
from passes.fuse.memory_efficient_ops import tanh_gelu
from passes.fuse.recognize_gelu import RecognizeGeluPass

C = math.sqrt(2.0 / math.pi)

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "transformers": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 3.0)))),
    "half last": lambda x: (torch.tanh((x + x.pow(3) * 0.044715) * 0.7978845608) + 1) * (x * 0.5),
}
OTHERS: dict[str, Callable[[Tensor], Tensor]] = {
    "another constant": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044 * torch.pow(x, 3.0)))),
    "another power": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x, 2.0)))),
    "another x": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (x + 0.044715 * torch.pow(x.sin(), 3.0)))),
    "twice x": lambda x: 0.5 * x * (1.0 + torch.tanh(C * (torch.add(x, 0.044715 * torch.pow(x, 3.0), alpha=2)))),
}


class Written(nn.Module):
    def __init__(self, form: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.form = form
        self.shift = nn.Parameter(torch.linspace(-3, 3, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.form(x + self.shift)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_recognized(form: str) -> None:
    net, x = Written(FORMS[form]).double(), torch.randn(4, 8).double()
    expected = net(x)
    (gradient,) = torch.autograd.grad(expected.square().sum(), net.shift)
    graph_module = capture_call(net, split_call((x,), {})).graph_module
    result = RecognizeGeluPass()(graph_module)
    assert result.modified
    calls = [str(n.target) for n in graph_module.graph.nodes if n.op == "call_function"]
    assert len(calls) == 2
    assert "tanh_gelu" in calls[1]
    (found,) = graph_module(x)
    assert torch.equal(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), net.shift)[0], gradient)
    assert not RecognizeGeluPass()(graph_module).modified


@pytest.mark.parametrize("form", OTHERS)
def test_similar_formulas_are_not_rewritten(form: str) -> None:
    graph_module = capture_call(Written(OTHERS[form]), split_call((torch.randn(4, 8),), {})).graph_module
    assert not RecognizeGeluPass()(graph_module).modified


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_no_bit_of_the_output_differs(dtype: torch.dtype, autocast: bool) -> None:
    net, x = Written(FORMS["transformers"]).to(dtype), torch.randn(64, 8).to(dtype) * 3
    graph_module = capture_call(net, split_call((x,), {})).graph_module
    assert RecognizeGeluPass()(graph_module).modified
    with torch.autocast("cpu", enabled=autocast):
        (found,), expected = graph_module(x), net(x)
    assert torch.equal(found, expected)


def test_gradients_of_gradients() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tanh_gelu(x, C, 0.044715), x)
    assert torch.autograd.gradgradcheck(lambda x: tanh_gelu(x, C, 0.044715), x)
