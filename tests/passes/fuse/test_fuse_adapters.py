"""What FuseAdaptersPass fuses, groups and does not change, and that results stay the same within rounding."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils.checkpoint import checkpoint

from passes.base import find_graph_modules
from passes.fuse.fuse_adapters import FuseAdaptersPass
from passes.fuse.fused_ops import OPERANDS_PER_SITE, fused_linears, fused_update

Prepare = Callable[..., Any]


class Attention(nn.Module):
    """Three siblings, one of another width, then a layer for each operator that multiplies with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        self.up = nn.Parameter(torch.randn(6, 10) / 3)
        self.bias = nn.Parameter(torch.randn(10))
        self.down = nn.Parameter(torch.randn(10, 8) / 3)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        y = torch.softmax(self.q(x) @ self.k(x).mT, -1) @ self.v(x)
        rows = y.reshape(-1, 6)
        y = F.gelu(torch.addmm(self.bias, rows, self.up)).view(2, 5, 10)
        result: Tensor = self.out(F.silu(y @ self.down))
        return result


class InPlace(nn.Module):
    """x changes between the two layers that read it, so they must not be grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.first(x)
        x.add_(1)
        z: Tensor = y + self.second(x)
        return z


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Attention()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.inner, x, use_reentrant=False)
        return y


class Reversed(nn.Module):
    """One weight used in both directions: the reverse direction is not fused, or becomes an update."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.weight)) @ self.weight


def count(graph_module: GraphModule, target: object) -> int:
    return sum(node.target is target for body in find_graph_modules(graph_module) for node in body.graph.nodes)


def groups(graph_module: GraphModule) -> list[int]:
    nodes = [n for body in find_graph_modules(graph_module) for n in body.graph.nodes if n.target is fused_linears]
    return [(len(node.args) - 2) // OPERANDS_PER_SITE for node in nodes]


def run(graph_module: GraphModule, bench: Any, x: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    bench.adapters.zero_grad()
    (y,) = graph_module(x)
    y.square().sum().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *(p.grad.clone() for p in bench.adapters.parameters())]


def prepare_both(prepare: Prepare, module: nn.Module, **options: Any) -> tuple[Any, Tensor]:
    x = torch.randn(2, 5, 8, dtype=next(module.parameters()).dtype)
    bench = prepare(module, x, rank=3, **options)
    bench.insert(bench.graph_module)
    bench.randomize()
    return bench, x


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("siblings", [False, True])
@pytest.mark.parametrize("model", [Attention, Checkpointed, Reversed])
def test_nothing_changes_beyond_rounding(
    prepare: Prepare, model: type[nn.Module], siblings: bool, recompute: bool
) -> None:
    bench, x = prepare_both(prepare, model().double())
    expected = run(bench.graph_module, bench, x)
    fuse = FuseAdaptersPass(group_siblings=siblings, recompute=recompute)
    result = fuse(bench.graph_module)
    assert result.modified
    found = run(result.graph_module, bench, x)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert not fuse(result.graph_module).modified


def test_siblings_are_grouped_and_every_kind_of_product_is_fused(prepare: Prepare) -> None:
    bench, _ = prepare_both(prepare, Attention())
    graph_module = FuseAdaptersPass()(bench.graph_module).graph_module
    assert groups(graph_module) == [3, 1, 1, 1]
    assert count(graph_module, fused_update) == 0
    for target in (torch.ops.aten.linear.default, torch.ops.aten.addmm.default):
        assert count(graph_module, target) == 0
    bench, _ = prepare_both(prepare, Attention())
    assert groups(FuseAdaptersPass(group_siblings=False)(bench.graph_module).graph_module) == [1] * 6


def test_no_group_across_an_in_place_operation(prepare: Prepare) -> None:
    bench, x = prepare_both(prepare, InPlace())
    expected = bench.graph_module(x)
    graph_module = FuseAdaptersPass()(bench.graph_module).graph_module
    assert groups(graph_module) == [1, 1]
    torch.testing.assert_close(graph_module(x), expected)


def test_recomputed_operators_are_named_in_the_graph(prepare: Prepare) -> None:
    bench, _ = prepare_both(prepare, Attention())
    graph_module = FuseAdaptersPass(recompute=True)(bench.graph_module).graph_module
    found = re.findall(r"recomputation = \(torch\.ops\.aten\.(\w+)", graph_module.code)
    assert found == ["layer_norm", "gelu", "silu"]


@pytest.mark.parametrize("is_small", [False, True])
def test_recomputing_keeps_less_for_backward(prepare: Prepare, is_small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.fuse.fused_ops._FEW_ROWS", 0)
    if not is_small:
        monkeypatch.setattr("passes.fuse.fused_ops._SMALL", 0)
    kept = []
    for recompute in (False, True):
        bench, x = prepare_both(prepare, Attention())
        graph_module = FuseAdaptersPass(recompute=recompute)(bench.graph_module).graph_module
        storages: dict[int, int] = {}

        def pack(tensor: Tensor, into: dict[int, int] = storages) -> Tensor:
            into[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            result = graph_module(x.requires_grad_())
        kept.append(sum(storages.values()))
        del result
    saved = 0 if is_small else (2 * (5 * 8) + 2 * (5 * 8) + 2 * (5 * 10)) * 4
    assert kept[1] == kept[0] - saved, "the outputs of layer_norm, silu and gelu"


def test_trainable_biases_and_weights_get_their_gradients(prepare: Prepare) -> None:
    bench, x = prepare_both(prepare, Attention())
    trained = [bench.module.q.bias, bench.module.out.weight, bench.module.bias]
    for parameter in trained:
        parameter.requires_grad_()
    found = []
    for fuse in (False, True):
        graph_module = FuseAdaptersPass()(bench.graph_module).graph_module if fuse else bench.graph_module
        found.append(torch.autograd.grad(graph_module(x)[0].square().sum(), trained))
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_half_precision_models_with_wide_adapters(prepare: Prepare, narrow: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8).to(narrow)
    bench = prepare(Attention().to(narrow), x, rank=3, dtype=torch.float32)
    bench.insert(bench.graph_module)
    for parameter in bench.adapters.parameters():
        parameter.data.normal_(0, 0.3)
    expected = run(bench.graph_module, bench, x)
    found = run(FuseAdaptersPass()(bench.graph_module).graph_module, bench, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=0.1, atol=0.05 * float(other.float().abs().max()))


def test_autocast_around_the_graph(prepare: Prepare) -> None:
    bench, x = prepare_both(prepare, Attention())
    with torch.autocast("cpu", torch.bfloat16):
        expected = run(bench.graph_module, bench, x)
        found = run(FuseAdaptersPass(recompute=True)(bench.graph_module).graph_module, bench, x)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one.float(), other.float(), rtol=0.1, atol=0.1 * float(other.float().abs().max()))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own tracer does it
@pytest.mark.parametrize("recompute", [False, True])
def test_torch_compile_gives_the_same(prepare: Prepare, recompute: bool) -> None:
    bench, x = prepare_both(prepare, Attention().double())
    expected = run(bench.graph_module, bench, x)
    graph_module = FuseAdaptersPass(recompute=recompute)(bench.graph_module).graph_module
    compiled: Any = torch.compile(graph_module, backend="aot_eager")
    torch.testing.assert_close(run(compiled, bench, x), expected, rtol=1e-9, atol=1e-9)
