"""Quantized frozen weights: memory, results, and agreement with bitsandbytes and PEFT."""

from __future__ import annotations

import copy
import gc
import io
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.config.adapter_config import QUANTIZED_KINDS as KINDS
from adapter_compiler.errors import ConfigError, MissingDependencyError
from passes.quantize.packed_weights import PackedWeight, find_packed_weights

bnb = pytest.importorskip("bitsandbytes")

X = torch.randn(4, 5, 64, generator=torch.Generator().manual_seed(0))
LABELS = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return y


class Net(nn.Module):
    """Layers with a common input, a transposed bare parameter, repeated blocks and an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 64)
        self.query = nn.Linear(64, 64)
        self.key = nn.Linear(64, 64, bias=False)
        self.raw = nn.Parameter(torch.randn(64, 64) / 8)
        self.blocks = nn.ModuleList(Block(64) for _ in range(2))
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.table.weight[0]
        x = (self.query(x) * self.key(x).sigmoid()) @ self.raw
        for block in self.blocks:
            x = block(x)
        y: Tensor = self.head(x)
        return y


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def compile_net(net: nn.Module, *, example: bool = True, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(**{"rank": 2, "alpha": 4, "quantize": "nf4", **options})
    return ac.compile_with_adapters(net, (X,) if example else (), config=config)


def randomize(adapted: ac.AdaptedModel) -> None:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)


def unpacked(adapted: ac.AdaptedModel) -> nn.Module:
    """The model with the values of its packed weights as plain parameters."""
    return adapted.copy_base()


def step(adapted: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    loss = (adapted(X) - LABELS).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return float(loss.detach())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("example", [True, False])
def test_full_precision_leaves_memory(net: Net, kind: str, example: bool) -> None:
    packed_names = ["query.weight", "key.weight", "blocks.0.up.weight", "blocks.1.down.weight", "head.weight"]
    watched = {name: weakref.ref(net.get_parameter(name)) for name in packed_names}
    original = {name: p.detach().clone() for name, p in net.named_parameters()}
    adapted = compile_net(net, example=example, quantize=kind, inplace=True)
    report = adapted.quantization_report
    assert report is not None
    adapted(X)
    del net
    gc.collect()
    assert [name for name, ref in watched.items() if ref() is not None] == []
    bits = {"nf4": 4.2, "int8": 8.5}[kind]
    values = sum(original[name].numel() for name in report.errors)
    saved = report.bytes_before - report.bytes_after
    # The two tables of NF4, 272 values for each weight, matter at this size.
    assert saved >= values * (32 - bits) / 8 - 1100 * len(report.errors)
    assert adapted.report().model_bytes == report.bytes_after
    assert f"{len(report.errors)} weights in {kind} (relative error up to" in str(adapted.report())
    assert adapted.report().to_dict()["quantization"]["bytes_before"] == report.bytes_before
    for name, error in report.errors.items():
        difference = adapted.base_weight(name).clone() - original[name]
        assert error.largest == pytest.approx(float(difference.abs().max()))
        assert error.relative == pytest.approx(float(difference.norm() / original[name].norm()))
        assert 0 < error.relative < {"nf4": 0.12, "int8": 0.01}[kind]


def test_the_users_model_keeps_its_weights(net: Net) -> None:
    before, expected = copy.deepcopy(net.state_dict()), net(X)
    adapted = compile_net(net)
    assert len(find_packed_weights(adapted.module)) == 8
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(net(X), expected)
    assert all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"fused": False},
        {"recompute": True},
        {"regions": (Block,), "checkpoint": True},
    ],
    ids=["fused", "unfused", "recompute", "checkpoint"],
)
def test_training_is_that_over_the_unpacked_values(net: Net, kind: str, options: dict[str, Any]) -> None:
    adapted = compile_net(net, quantize=kind, **options)
    dense = compile_net(unpacked(adapted), quantize=None, **options)
    for model in (adapted, dense):
        randomize(model)
    optimizers = [torch.optim.AdamW(m.trainable_parameters(), lr=1e-2) for m in (adapted, dense)]
    for _ in range(4):
        losses = [step(m, o) for m, o in zip((adapted, dense), optimizers, strict=True)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    torch.testing.assert_close(dict(adapted.adapters.state_dict()), dict(dense.adapters.state_dict()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("options", [{}, {"fused": False}], ids=["fused", "unfused"])
def test_backward_keeps_no_unpacked_weight(net: Net, options: dict[str, Any], autocast: bool) -> None:
    adapted = compile_net(net, **options)
    adapted(X)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = X.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=autocast):
        adapted(x)
    shapes = {tuple(w.shape) for w in find_packed_weights(adapted.module).values()}
    shapes |= {shape[::-1] for shape in shapes}
    of_weights = [t for t in kept if tuple(t.shape) in shapes]
    assert {type(t) for t in of_weights} == {PackedWeight}
    assert len({id(t.packed) for t in of_weights if isinstance(t, PackedWeight)}) == 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fold_unpacks_merges_and_reports_the_error(net: Net, kind: str, dtype: torch.dtype) -> None:
    net.to(dtype)
    x = X.to(dtype)
    config = ac.AdapterConfig(rank=2, quantize=kind)
    adapted = ac.compile_with_adapters(net, (x,), config=config)
    randomize(adapted)
    folded = adapted.fold()
    assert type(folded) is Net
    assert list(folded.state_dict()) == list(net.state_dict())
    assert {type(p) for p in folded.parameters()} == {nn.Parameter}
    assert {p.dtype for p in folded.parameters()} == {dtype}
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float64: 1e-9}[dtype]
    torch.testing.assert_close(folded(x), adapted(x), rtol=tolerance, atol=tolerance)
    assert adapted.fold_report is not None
    for adapter in adapted.plan:
        parameters = {k: p.detach().double() for k, p in adapted.adapters.parameters_of(adapter).items()}
        exact = net.get_parameter(adapter.site.name).detach().double() + adapter.delta(parameters)
        difference = folded.get_parameter(adapter.site.name).detach().double() - exact
        error = adapted.fold_report.quantization_error[adapter.site.name]
        rounding = adapted.fold_report.rounding_error[adapter.site.name]
        assert float(difference.abs().max()) == pytest.approx(error.largest, abs=rounding + 1e-6)
        if dtype is not torch.bfloat16:
            norm = net.get_parameter(adapter.site.name).detach().double().norm()
            assert float(difference.norm() / norm) == pytest.approx(error.relative, rel=1e-2)


def test_adapters_are_saved_and_loaded_without_the_base(net: Net, tmp_path: Path) -> None:
    adapted = compile_net(net)
    randomize(adapted)
    path = adapted.save(tmp_path)
    assert path.stat().st_size < 60_000
    other = compile_net(copy.deepcopy(net))
    ac.load_adapters(other, tmp_path)
    assert torch.equal(other(X), adapted(X))
    plain = compile_net(copy.deepcopy(net), quantize=None)
    ac.load_adapters(plain, tmp_path)
    plain.quantize_base("nf4")
    torch.testing.assert_close(plain(X), adapted(X), rtol=0, atol=0)


def test_states_copies_pickles_and_moves(net: Net) -> None:
    adapted = compile_net(net)
    randomize(adapted)
    expected = adapted(X)
    buffer = io.BytesIO()
    torch.save(adapted, buffer)
    buffer.seek(0)
    other = compile_net(Net())
    other.load_state_dict(adapted.state_dict())
    for model in (copy.deepcopy(adapted), torch.load(buffer, weights_only=False), other):
        assert torch.equal(model(X), expected)
        assert len(find_packed_weights(model.module)) == 8
    adapted.to(torch.float64)
    assert len(find_packed_weights(adapted.module)) == 8
    torch.testing.assert_close(adapted(X.double()).float(), expected, rtol=1e-4, atol=1e-4)
    adapted.eval()
    torch.testing.assert_close(adapted(X.double()).float(), expected, rtol=1e-4, atol=1e-4)


def test_several_adapters_share_the_packed_weights(net: Net) -> None:
    adapted = compile_net(net)
    adapted.add_adapter("second", config=ac.AdapterConfig(rank=3))
    base = adapted(X)
    adapted.use("second")
    randomize(adapted)
    assert len(find_packed_weights(adapted.module)) == 8
    torch.testing.assert_close(adapted.fold()(X), adapted(X), rtol=1e-4, atol=1e-4)
    adapted.use("default")
    torch.testing.assert_close(adapted(X), base, rtol=0, atol=0)


def test_python_sees_unpacked_values() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 32)
            self.raw = nn.Parameter(torch.randn(64, 64) / 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) @ self.raw
            z: Tensor = self.b(y if float(y.detach().sum()) > 0 else -y)
            return z

    torch.manual_seed(0)
    adapted = compile_net(Branching())
    randomize(adapted)
    torch.testing.assert_close(adapted(X), adapted.fold()(X), rtol=1e-4, atol=1e-5)
    adapted(X).square().mean().backward()
    assert all(p.grad is not None for p in adapted.adapters.parameters())


def test_a_packed_projection_and_disabled_adapters() -> None:
    """``in_proj_weight`` is used by rows; without adapters, nn.MultiheadAttention reads the weights in its own way."""
    torch.manual_seed(0)
    adapted = compile_net(nn.TransformerEncoderLayer(64, 4, 96, dropout=0, batch_first=True))
    assert "self_attn.in_proj_weight" in find_packed_weights(adapted.module)
    base = adapted.copy_base()
    randomize(adapted)
    for training in (True, False):
        adapted.train(training)
        torch.testing.assert_close(adapted(X), adapted.fold()(X), rtol=1e-4, atol=1e-5)
        with adapted.disable_adapters(), torch.no_grad():
            torch.testing.assert_close(adapted(X), base.train(training)(X), rtol=1e-5, atol=1e-5)


def test_what_is_not_a_matrix_of_products_stays(net: Net) -> None:
    adapted = compile_net(net, sites=("table", "query"), trainable="head.*")
    assert set(find_packed_weights(adapted.module)) == {"query.weight"}
    assert adapted.quantization_report is not None
    (reason,) = adapted.quantization_report.skipped.values()
    assert "not only by matrix products" in reason
    with pytest.raises(ConfigError, match=r"no adapted weight can be quantized, expected at least one; table\.weight"):
        compile_net(net, sites="table")
    with pytest.raises(ConfigError, match="quantized to 'nf4' already"):
        adapted.quantize_base("int8")
    with pytest.raises(ConfigError, match=r"quantize='fp3': expected one of 'nf4', 'int8', or None"):
        compile_net(net, quantize=None).quantize_base("fp3")
    with pytest.raises(ConfigError, match=r"AdapterConfig\(quantize='fp3'\): expected one of 'nf4', 'int8'"):
        ac.AdapterConfig(quantize="fp3")


@pytest.mark.parametrize(("kind", "value"), [("nf4", float("inf")), ("int8", 1e6)])
def test_values_that_the_code_cannot_hold_are_named(net: Net, kind: str, value: float) -> None:
    with torch.no_grad():
        net.head.weight[0, 0] = value
    adapted = compile_net(net, quantize=None, sites=("query", "head"))
    with pytest.raises(ConfigError, match=rf"head\.weight cannot be quantized to '{kind}': its unpacked values have"):
        adapted.quantize_base(kind)
    assert not find_packed_weights(adapted.module)


def test_without_bitsandbytes_the_extra_is_named(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'adapter-compiler\[qlora\]'"):
        compile_net(net)


def test_a_plan_without_memory_is_not_quantized() -> None:
    with torch.device("meta"):
        model = Net()
    adapted = ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(quantize="nf4"))
    assert adapted.quantization_report is None


def test_onnx_files_hold_the_unpacked_values(net: Net, tmp_path: Path) -> None:
    adapted = compile_net(net).eval()
    randomize(adapted)
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (X,))
    assert report.max_abs_error < 1e-4


def test_distributed_data_parallel_ignores_the_codes(net: Net, tmp_path: Path) -> None:
    adapted = compile_net(net)
    randomize(adapted)
    expected = adapted(X)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(adapted)
        assert torch.equal(wrapped(X), expected)
        wrapped(X).sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    assert all(p.grad is not None for p in adapted.trainable_parameters())


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("name", ["PagedAdamW32bit", "PagedAdamW8bit", "AdamW8bit"])
def test_a_budget_accepts_paged_optimizers(net: Net, name: str) -> None:
    adapted = compile_net(net)
    optimizer = getattr(bnb.optim, name)(adapted.trainable_parameters(), lr=1e-2)
    schedule = ac.BudgetSchedule(target_rank=1, total_steps=6, warmup_steps=1, final_steps=2, interval=1, compact=True)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    losses = [step(adapted, optimizer) for _ in range(6)]
    assert losses[-1] < losses[0]
    assert sum(a.rank for a in adapted.plan) == budget.live_triplets == 8
