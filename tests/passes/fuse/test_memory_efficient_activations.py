"""Which nodes are replaced, and that a model with dropout gives the same outputs, gradients and random draws."""

from __future__ import annotations

import torch
from torch import nn

from passes.capture.calls import split_call
from passes.capture.capture import capture_call
from passes.fuse.memory_efficient_activations import MemoryEfficientActivationsPass


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(64, 192)
        self.outer = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        heads = self.inner(x).unflatten(-1, (3, 4, 16)).permute(2, 0, 3, 1, 4)
        q, k, v = heads
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p=0.2 if self.training else 0.0)
        return x + nn.functional.dropout(self.outer(y.transpose(1, 2).flatten(2)), 0.1, self.training)


def run(graph_module: nn.Module, net: nn.Module, *tensors: torch.Tensor) -> tuple[list[torch.Tensor], torch.Tensor]:
    torch.manual_seed(5)
    net.zero_grad()
    (output,) = graph_module(*tensors)
    output.square().sum().backward()
    return [output, *(p.grad for p in net.parameters() if p.grad is not None)], torch.get_rng_state()


def test_a_block_in_training() -> None:
    net = Block()
    tensors = torch.randn(8, 70, 64), torch.ones(8, 1, 70, 70).tril().bool()
    graph_module = capture_call(net, split_call(tensors, {})).graph_module
    expected, state = run(graph_module, net, *tensors)
    result = MemoryEfficientActivationsPass()(graph_module)
    assert result.modified
    assert result.graph_module.code.count("memory_efficient_dropout(") == 1
    assert result.graph_module.code.count("memory_efficient_attention(") == 1
    found, draws = run(result.graph_module, net, *tensors)
    assert len(found) == 5
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)  # sums of 560 products in another order
    assert torch.equal(draws, state)
    assert not MemoryEfficientActivationsPass()(result.graph_module).modified


def test_graphs_in_eval_mode_are_not_changed() -> None:
    net = Block().eval()
    tensors = torch.randn(2, 3, 64), torch.ones(2, 1, 3, 3).bool()
    graph_module = capture_call(net, split_call(tensors, {})).graph_module
    assert not MemoryEfficientActivationsPass()(graph_module).modified
