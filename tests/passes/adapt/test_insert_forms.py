"""Golden graphs of forms other than SVD: LoRA with and without fusing, DoRA with a bias and in regions, folding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.fuse.fuse_adapters import FuseAdaptersPass

Prepare = Callable[..., Any]

LORA = """\
def forward(self, tensors_0):
adapters_weight_b = self.adapters.weight.B
adapters_weight_a = self.adapters.weight.A
module_weight = self.module.weight
module_bias = self.module.bias
linear = aten.linear.default(tensors_0, module_weight, module_bias)
linear_default = aten.linear.default(tensors_0, adapters_weight_a)
mul_tensor = aten.mul.Tensor(linear_default, 0.5)
linear_default_1 = aten.linear.default(mul_tensor, adapters_weight_b)
add_tensor = aten.add.Tensor(linear, linear_default_1)
return (add_tensor,)"""

DORA = """\
def forward(self, tensors_0):
adapters_weight_b = self.adapters.weight.B
adapters_weight_a = self.adapters.weight.A
adapters_weight_magnitude = self.adapters.weight.magnitude
module_weight = self.module.weight
detach_default = aten.detach.default(adapters_weight_b)
detach_default_1 = aten.detach.default(adapters_weight_a)
mul_tensor = aten.mul.Tensor(detach_default, 0.5)
matmul_default = aten.matmul.default(mul_tensor, detach_default_1)
add_tensor = aten.add.Tensor(module_weight, matmul_default)
linalg_vector_norm_default = aten.linalg_vector_norm.default(add_tensor, 2, [1])
eq_scalar = aten.eq.Scalar(linalg_vector_norm_default, 0)
add_tensor_1 = aten.add.Tensor(linalg_vector_norm_default, eq_scalar)
div_tensor = aten.div.Tensor(adapters_weight_magnitude, add_tensor_1)
module_bias = self.module.bias
linear = aten.linear.default(tensors_0, module_weight, module_bias)
linear_default = aten.linear.default(tensors_0, adapters_weight_a)
mul_tensor_1 = aten.mul.Tensor(linear_default, 0.5)
linear_default_1 = aten.linear.default(mul_tensor_1, adapters_weight_b)
sub_tensor = aten.sub.Tensor(linear, module_bias)
sub_scalar = aten.sub.Scalar(div_tensor, 1)
mul_tensor_2 = aten.mul.Tensor(sub_tensor, sub_scalar)
mul_tensor_3 = aten.mul.Tensor(linear_default_1, div_tensor)
add_tensor_2 = aten.add.Tensor(mul_tensor_2, mul_tensor_3)
add_tensor_3 = aten.add.Tensor(linear, add_tensor_2)
return (add_tensor_3,)"""


@pytest.mark.parametrize(("form", "golden", "added"), [("lora", LORA, 6), ("dora", DORA, 21)])
def test_insertion_and_fold(form: str, golden: str, added: int, prepare: Prepare) -> None:
    bench = prepare(nn.Linear(3, 5), torch.randn(4, 3), form=form)
    before, nodes = bench.codes(), bench.count_nodes()
    assert bench.insert(bench.graph_module).modified
    assert bench.print() == golden
    assert bench.count_nodes() - nodes == bench.count_tagged() == added
    assert not bench.insert(bench.graph_module).modified
    bench.randomize()
    x = torch.randn(4, 3)
    expected = bench.graph_module(x)[0]
    assert bench.fold(bench.graph_module).modified
    assert bench.codes() == before
    torch.testing.assert_close(bench.graph_module(x)[0], expected)


class Guarded(nn.Module):
    """The weight is used twice inside an autocast region, optionally once in the reverse direction."""

    def __init__(self, both_ways: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6) / 3)
        self.both_ways = both_ways

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y: Tensor = torch.nn.functional.linear(x, self.weight).tanh()
            if self.both_ways:
                return y @ self.weight
            return torch.nn.functional.linear(y, self.weight)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("form", ["lora", "dora", "dora-svd-offset2"])
def test_regions_and_both_directions(form: str, both_ways: bool, prepare: Prepare) -> None:
    bench = prepare(Guarded(both_ways), torch.randn(4, 6), form=form)
    before = bench.codes()
    bench.insert(bench.graph_module)
    bench.randomize()
    x = torch.randn(4, 6)
    expected = bench.graph_module(x)[0]
    bench.fold(bench.graph_module)
    assert bench.codes() == before
    torch.testing.assert_close(bench.graph_module(x)[0], expected, rtol=1e-5, atol=1e-5)


def test_lora_is_fused_and_dora_is_not(prepare: Prepare) -> None:
    for form, name in (("lora", "fused_linears"), ("dora", None)):
        bench = prepare(nn.Linear(3, 5), torch.randn(4, 3), form=form)
        bench.insert(bench.graph_module)
        bench.randomize()
        x = torch.randn(4, 3)
        expected = bench.graph_module(x)[0]
        assert FuseAdaptersPass()(bench.graph_module).modified == (name is not None)
        assert ("fused_linears" in bench.codes()[0]) == (name is not None)
        torch.testing.assert_close(bench.graph_module(x)[0], expected)
