"""Packed weights replace dense weights in graphs, and products with them dequantize again in backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from passes.analysis.weight_uses import find_parameter_aliases
from passes.capture.calls import split_call
from passes.capture.capture import MODULE_PREFIX, capture_call
from passes.quantize.packed_weights import PackedValues, PackedWeight, pack_parameter, set_parameter
from passes.quantize.recompute_weights import RecomputeWeightsPass, packed_linear


class HalfValues(PackedValues):
    """Values in float16."""

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def unpack(self) -> Tensor:
        return self.codes.float()

    def tensors(self) -> dict[str, Tensor]:
        return {"codes": self.codes}

    def to(self, device: torch.device) -> HalfValues:
        return HalfValues(self.codes.to(device))


class Halving:
    name = "half"

    def pack(self, weight: Tensor) -> HalfValues:
        return HalfValues(weight.half())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.raw = nn.Parameter(torch.randn(6, 5))
        self.sliced = nn.Parameter(torch.randn(8, 5))
        self.tied = self.up

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x.transpose(0, 1)) @ self.raw
        z: Tensor = torch.nn.functional.linear(y, self.sliced[:3]) + self.tied(x).sum()
        return z


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
WEIGHTS = ("raw", "up.weight", "sliced")


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def capture(net: Net) -> GraphModule:
    net.requires_grad_(False)
    return capture_call(net, split_call((X,), {})).graph_module


def pack(net: Net, *names: str) -> dict[str, nn.Parameter]:
    return {name: pack_parameter(net.get_parameter(name), Halving()) for name in names}


def test_products_with_whole_weights_are_rewritten(net: Net) -> None:
    graph_module, weights = capture(net), pack(net, *WEIGHTS)
    aliases = find_parameter_aliases(net)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        first = aliases[str(node.target).removeprefix(MODULE_PREFIX)]
        if first in weights:
            set_parameter(graph_module, str(node.target), weights[first])
    expected = graph_module(X)[0]
    assert RecomputeWeightsPass()(graph_module).modified
    targets = [node.target for node in graph_module.graph.nodes if node.op == "call_function"]
    assert targets.count(packed_linear) == 3
    # A product with a part of a weight reads dequantized values.
    assert targets.count(torch.ops.aten.linear.default) == 1
    assert not RecomputeWeightsPass()(graph_module).modified
    torch.testing.assert_close(graph_module(X)[0], expected)


def test_products_with_dense_weights_are_not_rewritten(net: Net) -> None:
    assert not RecomputeWeightsPass()(capture(net)).modified


@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_the_rewritten_product_saves_nothing_dense(net: Net, shape: tuple[int, ...]) -> None:
    """Also for a strided x, for which a plain product would save a copy of the weight."""
    (packed,) = pack(net, "up.weight").values()
    assert isinstance(packed, PackedWeight)
    dense, bias = packed.unpack(), torch.ones(6)
    kept: list[type] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(type(tensor))
        return tensor

    results = []
    for compute, weight in ((packed_linear, packed), (torch.nn.functional.linear, dense)):
        x, b = torch.randn(shape, generator=torch.Generator().manual_seed(3)).requires_grad_(), bias.clone()
        b.requires_grad_()
        strided = x.transpose(0, 1) if len(shape) == 3 else x
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = compute(strided, weight, b)
        if weight is packed:
            assert kept == [PackedWeight]
        y.square().sum().backward()
        results.append((y, x.grad, b.grad))
    torch.testing.assert_close(results[0], results[1])


def test_the_rewritten_product_under_autocast(net: Net) -> None:
    (packed,) = pack(net, "up.weight").values()
    x, bias = X.clone().requires_grad_(), torch.ones(6, requires_grad=True)
    with torch.autocast("cpu"):
        y = packed_linear(x, packed, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert x.grad is not None and bias.grad is not None
    assert (x.grad.dtype, bias.grad.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(bias.grad, torch.full((6,), 6.0))
