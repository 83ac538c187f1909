"""Packed projections and stacked experts: one adapter for all of a weight, or one for each part of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import peft
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, SiteError
from adapter_compiler.saving.folders.write_peft import save_peft_adapters
from adapter_compiler.saving.folding.fold_files import fold_files


class Packed(nn.Module):
    """Attention with one weight for query, key and value: fewer keys and values than queries, as in GQA."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.qkv = nn.Linear(16, 8, bias=False) if transposed else nn.Linear(8, 16, bias=False)
        self.out = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        packed = x @ self.qkv.weight if self.transposed else self.qkv(x)
        query, key, value = packed.split((8, 4, 4), dim=-1)
        scores = torch.softmax(query @ torch.cat([key, key], -1).transpose(1, 2), dim=-1)
        result: Tensor = self.out(scores @ torch.cat([value, value], -1))
        return result


class Experts(nn.Module):
    """Every expert on every token, weighed by a router; weights stored [E, in, out] and [E, out, in]."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(8, 3)
        self.up = nn.Parameter(torch.randn(3, 8, 12) * 0.3)
        self.down = nn.Parameter(torch.randn(3, 8, 12) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        each = torch.bmm(tokens.expand(3, -1, -1), self.up).relu() @ self.down.transpose(1, 2)
        weights = self.router(tokens).softmax(-1)
        return torch.einsum("end,ne->nd", each, weights).view_as(x)


def compile_disturbed(model: nn.Module, x: Tensor, **options: Any) -> ac.AdaptedModel:
    adapted = ac.compile_with_adapters(model.eval(), (x,), config=ac.AdapterConfig(rank=2, alpha=2, **options))
    torch.testing.assert_close(adapted(x), model(x))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.5)
    return adapted


def assert_is_effective(adapted: ac.AdaptedModel, x: Tensor) -> None:
    """Check that outputs and gradients are those of eager code with W + ΔW, and that fold gives these weights."""
    parameters = list(adapted.adapters.parameters())
    inner = {
        name: weight.detach() + sum(a.delta(adapted.adapters.parameters_of(a)) for a in adapted.plan.by_weight[name])
        for name, weight in adapted.module.named_parameters()
        if name in adapted.plan.by_weight
    }
    expected = torch.func.functional_call(adapted.copy_base(), inner, (x,))
    found = adapted(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    mine = torch.autograd.grad(found.square().sum(), parameters)
    torch.testing.assert_close(mine, torch.autograd.grad(expected.square().sum(), parameters), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapted.fold()(x), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("split", [2, 4, (8, 4, 4)])
def test_a_packed_projection_has_an_adapter_for_each_part(transposed: bool, split: Any) -> None:
    x = torch.randn(2, 5, 8)
    rule = ac.AdapterRule(name="qkv", split=split, rank=3)
    adapted = compile_disturbed(Packed(transposed), x, rules=(rule,))
    sizes = (16 // split,) * split if isinstance(split, int) else split
    found = [a for a in adapted.plan if a.site.weight == "qkv.weight"]
    assert [a.site.out_features for a in found] == list(sizes)
    assert {a.rank for a in found} == {3}
    assert len({a.site.name for a in adapted.plan}) == len(sizes) + 1
    nodes = adapted.capture(x).graph.nodes
    assert sum(node.target is torch.ops.aten.constant_pad_nd.default for node in nodes) == len(sizes)
    assert_is_effective(adapted, x)


def test_the_packed_weight_of_torchs_attention() -> None:
    x = torch.randn(2, 5, 8)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    rule = ac.AdapterRule(name="*.in_proj_weight", split=3)
    adapted = compile_disturbed(model, x, rules=(rule,))
    assert [s.rows for s in adapted.sites if s.weight == "self_attn.in_proj_weight"] == [(0, 8), (8, 16), (16, 24)]
    torch.testing.assert_close(adapted.fold()(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_stacked_experts_run_on_activations_and_split_by_matrix() -> None:
    x = torch.randn(2, 5, 8)
    adapted = compile_disturbed(Experts(), x)
    assert [(s.name, s.role) for s in adapted.sites if s.name != "router.weight"] == [
        ("up", "expert.up"),
        ("down", "expert.down"),
    ]
    names = [str(node.target) for node in adapted.capture(x).graph.nodes if "adapter_site" in node.meta]
    assert sum("bmm" in name for name in names) == 1
    assert_is_effective(adapted, x)
    rule = ac.AdapterRule(role="expert.*", split="matrices")
    parts = compile_disturbed(Experts(), x, rules=(rule,))
    assert [s.rows for s in parts.sites if s.weight == "up"] == [(0, 8), (8, 16), (16, 24)]
    assert_is_effective(parts, x)


def test_parts_are_pruned_saved_planned_and_exported_each_by_itself(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    config = ac.AdapterConfig(rank=3, alpha=3, rules=(ac.AdapterRule(name="qkv", split=(8, 4, 4)),))
    model = Packed().eval()
    adapted = ac.compile_with_adapters(model, (x,), config=config)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.05)
    schedule = ac.BudgetSchedule(target_rank=1, total_steps=8, warmup_steps=1, final_steps=2, interval=1)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    for _ in range(8):
        optimizer.zero_grad()
        (adapted(x) - 1).square().sum().backward()
        optimizer.step()
    assert sum(budget.ranks().values()) == 4
    assert budget.ranks().keys() == {site.name for site in adapted.sites}
    adapted.save(tmp_path)
    again = ac.compile_with_adapters(model, (x,), plan=ac.AdapterPlan.from_json(adapted.plan.to_json()))
    ac.load_adapters(again, tmp_path)
    torch.testing.assert_close(again(x), adapted(x), rtol=0, atol=0)
    budget.compact()
    torch.testing.assert_close(adapted(x), again(x), rtol=1e-5, atol=1e-6)

    ac.export_onnx(adapted, tmp_path / "runtime.onnx", (x,), adapters="runtime")
    file = ac.save_onnx_adapter(adapted, tmp_path / "a.onnx_adapter")
    session = ac.OnnxAdapters(tmp_path / "runtime.onnx")
    session.load("a", file)
    (found,) = session.run({"x": x.numpy()}, adapter="a").values()
    torch.testing.assert_close(torch.from_numpy(found), adapted(x).detach(), rtol=1e-4, atol=1e-5)


def test_parts_fold_into_files_bit_for_bit(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    x = torch.randn(2, 5, 8)
    model = Packed().eval()
    adapted = compile_disturbed(model, x, rules=(ac.AdapterRule(name="qkv", split=(8, 4, 4)),))
    adapted.save(tmp_path / "adapters")
    save_file(dict(model.state_dict()), tmp_path / "base.safetensors")
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "folded.safetensors")
    merged = load_file(tmp_path / "folded.safetensors")
    for name, weight in adapted.fold().state_dict().items():
        torch.testing.assert_close(merged[name], weight, rtol=0, atol=0)
    ac.export_onnx(model, tmp_path / "base.onnx", (x,))
    fold_files(tmp_path / "base.onnx", tmp_path / "adapters", tmp_path / "folded.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "folded.onnx")
    (found,) = session.run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), adapted(x).detach(), rtol=1e-4, atol=1e-5)


def test_parts_are_one_lora_for_peft(tmp_path: Path) -> None:
    x = torch.randn(2, 5, 8)
    model = Packed().eval()
    adapted = compile_disturbed(model, x, rules=(ac.AdapterRule(name="qkv", split=(8, 4, 4)),))
    save_peft_adapters(adapted, tmp_path / "lora")
    theirs = peft.PeftModel.from_pretrained(model, tmp_path / "lora")
    torch.testing.assert_close(theirs(x), adapted(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match="covers some rows of its weight, AdaLoRA all; write LoRA"):
        save_peft_adapters(adapted, tmp_path / "adalora", kind="adalora")


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (3, "split=3 does not split the 16 rows"),
        ((8, 4), "does not split the 16 rows"),
        ("matrices", "or 'matrices' for a weight of three dimensions"),
        (0, "a number of equal parts"),
        ("experts", "a number of equal parts, a tuple of sizes, or 'matrices'"),
    ],
)
def test_splits_that_do_not_fit_are_refused(split: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        ac.compile_with_adapters(Packed(), config=ac.AdapterConfig(rules=(ac.AdapterRule(name="qkv", split=split),)))
