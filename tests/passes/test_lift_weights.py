"""A lifted graph gives what its graph module gives, whatever replaces the weights."""

from __future__ import annotations

import torch
from torch import nn

from passes.calls import split_call
from passes.capture import capture_call
from passes.lift_weights import LiftedGraph


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 3))
        self.register_buffer("offset", torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.inner(x) + self.offset + torch.tensor([1.0, 2.0, 3.0])
        return y


def test_the_same_numbers_and_gradients() -> None:
    net, x = Net(), torch.randn(2, 3)
    graph_module = capture_call(net, split_call((x,), {})).graph_module
    code = graph_module.code
    (found,) = LiftedGraph(graph_module)(x)
    assert torch.equal(found, net(x))
    found.sum().backward()
    gradients = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    net.zero_grad()
    net(x).sum().backward()
    assert len(gradients) == 4
    assert all(torch.equal(g, p.grad) for g, p in zip(gradients, net.parameters(), strict=True) if p.grad is not None)
    assert graph_module.code == code


def test_replaced_tensors_are_seen() -> None:
    net, x = Net(), torch.randn(2, 3)
    graph_module = capture_call(net, split_call((x,), {})).graph_module
    lifted = LiftedGraph(graph_module)
    holder = graph_module.get_submodule("module.inner.0")
    holder.weight = nn.Parameter(torch.zeros(4, 3))
    graph_module.get_submodule("module").offset = torch.full((3,), 5.0)
    assert torch.equal(lifted(x)[0], graph_module(x)[0])
    del holder.weight
    holder.weight = torch.ones(4, 3)  # a plain tensor, as sharding puts in place of a parameter
    assert torch.equal(lifted(x)[0], graph_module(x)[0])
