"""Every kind of adapter with every kind of use: unchanged outputs at the start, gradients, fold, save, export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError, CheckpointError, ConfigError
from adapter_compiler.saving.folding.fold_files import fold_files
from passes.forms import FORMS

KINDS = tuple(FORMS)
IDS = torch.tensor([[1, 4, 0, 2], [3, 1, 5, 0]])


class Uses(nn.Module):
    """One weight for each kind of use."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 8, padding_idx=0)
        self.convolution = nn.Conv1d(8, 10, 3, padding=1)
        self.linear = nn.Linear(10, 12)
        self.bare = nn.Parameter(torch.randn(12, 8) / 4)
        self.bias = nn.Parameter(torch.randn(8))
        self.split = nn.Parameter(torch.randn(8, 8) / 4)
        self.plain = nn.Linear(8, 8, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.convolution(self.embedding(ids).mT).mT
        x = torch.tanh(self.linear(x)).reshape(-1, 12)
        x = torch.addmm(self.bias, x, self.bare).tanh()
        x = torch.cat([F.linear(x, self.split[:3]), F.linear(x, self.split[3:])], -1)
        result: Tensor = self.plain(self.plain(x)) @ self.embedding.weight.mT
        return result


SITES = ("embedding", "convolution", "linear", "bare", "split", "plain")


def make(dtype: torch.dtype = torch.float32) -> Uses:
    torch.manual_seed(0)
    return Uses().to(dtype).eval()


def adapt(model: nn.Module, kind: str, **options: Any) -> ac.AdaptedModel:
    options = {"rank": 2, "alpha": 1.0, "sites": SITES, **options}
    return ac.compile_with_adapters(model, (IDS,), config=ac.AdapterConfig(kind=kind, **options))


@torch.no_grad()
def disturb(adapted: ac.AdaptedModel) -> None:
    torch.manual_seed(1)
    for parameter in adapted.trainable_parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)


def exact_weight(weight: Tensor, p: dict[str, Tensor], site: Any, scale: float) -> Tensor:
    """W' from the papers' formulas."""
    left, right = (p["P"] * p["lam"], p["Q"]) if "lam" in p else (p["B"], p["A"])
    start: Tensor | float = 0.0
    if "A_start" in p:
        start = p["B_start"] @ p["A_start"]
    rows = weight.t() if site.transposed else weight.flatten(1)
    total = rows + scale * (left @ right - start)
    if "magnitude" in p:
        total = p["magnitude"].unsqueeze(1) * total / total.detach().norm(dim=1, keepdim=True).clamp_min(1e-30)
    return (total.t() if site.transposed else total).reshape(weight.shape)


def run_exact(adapted: ac.AdaptedModel, model: nn.Module) -> Tensor:
    weights = {
        a.site.name: exact_weight(
            model.get_parameter(a.site.name).detach(), dict(adapted.adapters.parameters_of(a)), a.site, a.scale
        )
        for a in adapted.plan
    }
    result: Tensor = torch.func.functional_call(model, weights, (IDS,))
    return result


@pytest.mark.parametrize("init", [None, "pissa"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_start_is_the_base(kind: str, dtype: torch.dtype, init: str | None) -> None:
    model = make(dtype)
    before = copy.deepcopy(model.state_dict())
    base = copy.deepcopy(model).requires_grad_(False)  # on some processors, kernels round differently with gradients
    adapted = adapt(model, kind, init=init)
    assert len(adapted.sites) == 6
    # Fusing splits addmm, which rounds one more time.
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(adapted(IDS), model(IDS), rtol=1e-5, atol=tolerance)
    if "dora" not in kind:
        if init is None and dtype == torch.float32:
            assert torch.equal(adapted(IDS), model(IDS))
        torch.testing.assert_close(adapted.fold().state_dict(), before, rtol=0, atol=0)
    disturb(adapted)
    assert not torch.allclose(adapted(IDS), model(IDS))
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    with adapted.disable_adapters():
        assert torch.equal(adapted(IDS), base(IDS))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("kind", "init"), [*((kind, None) for kind in KINDS), ("lora", "pissa"), ("dora", "pissa")])
def test_outputs_and_gradients_are_those_of_the_formula(kind: str, init: str | None, fused: bool) -> None:
    model = make(torch.float64)
    adapted = adapt(model, kind, fused=fused, init=init)
    disturb(adapted)
    parameters = adapted.trainable_parameters()
    expected = run_exact(adapted, model)
    found = adapted(IDS)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected.square().sum(), parameters)
    got = torch.autograd.grad(found.square().sum(), parameters)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("kind", KINDS)
def test_fold_is_the_adapted_model(kind: str, dtype: torch.dtype, tolerance: float) -> None:
    adapted = adapt(make(dtype), kind, init="pissa" if dtype == torch.bfloat16 else None)
    disturb(adapted)
    expected = adapted(IDS)
    folded = adapted.fold()
    assert type(folded) is Uses
    scale = float(expected.detach().abs().max())
    torch.testing.assert_close(folded(IDS), expected, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_watched_computes_the_same_as_what_is_recorded(kind: str) -> None:
    model = make(torch.float64)
    # Watching does not show whether a bare weight is used transposed, and the rows of a magnitude depend on it.
    sites = tuple(site for site in SITES if site != "bare")
    adapted = adapt(model, kind, sites=sites)
    disturb(adapted)
    expected = adapted(IDS)
    watched = adapt(model, kind, sites=sites, capture="off")
    watched.adapters.load_state_dict(adapted.adapters.state_dict())
    torch.testing.assert_close(watched(IDS), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_adapters_come_back_on_the_original_model(kind: str, tmp_path: Path) -> None:
    model = make()
    trained = adapt(model, kind)
    disturb(trained)
    trained.save(tmp_path)
    other = adapt(copy.deepcopy(model), kind)
    ac.load_adapters(other, tmp_path)
    assert torch.equal(other(IDS), trained(IDS))
    assert [p.requires_grad for p in other.adapters.parameters()] == [
        p.requires_grad for p in trained.adapters.parameters()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_start_that_is_not_zero_is_in_the_file(kind: str, tmp_path: Path) -> None:
    model = make()
    trained = adapt(model, kind, init="pissa")
    disturb(trained)
    trained.save(tmp_path / "shifted")
    plain = adapt(model, kind)
    disturb(plain)
    plain.save(tmp_path / "plain")
    other = adapt(copy.deepcopy(model), kind)
    identities = [id(p) for p in other.trainable_parameters()]
    for folder, expected in (("shifted", trained), ("plain", plain), ("shifted", trained)):
        ac.load_adapters(other, tmp_path / folder)
        torch.testing.assert_close(other(IDS), expected(IDS))
        assert {id(p) for p in other.trainable_parameters()} == set(identities)
    torch.testing.assert_close(other.fold().state_dict(), trained.fold().state_dict())


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    adapt(make(), "lora", init="pissa").save(tmp_path)
    with pytest.raises(CheckpointError, match=r"site \S+ was saved with form=lora-offset2, this model has form=svd"):
        ac.load_adapters(adapt(make(), "svd"), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_files_are_folded_without_the_model(kind: str, tmp_path: Path) -> None:
    model = make()
    adapted = adapt(model, kind, init="pissa" if "dora" in kind else None)
    disturb(adapted)
    adapted.save(tmp_path / "adapters")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "base.safetensors")
    fold_files(tmp_path / "base.safetensors", tmp_path / "adapters", tmp_path / "out.safetensors")
    torch.testing.assert_close(load_file(tmp_path / "out.safetensors"), dict(adapted.fold().state_dict()))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_export_merges_any_kind(kind: str, tmp_path: Path) -> None:
    adapted = adapt(make(), kind)
    disturb(adapted)
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (IDS,))
    assert report.max_abs_error < 1e-4


def test_lora_goes_into_a_file_at_run_time_and_dora_does_not(tmp_path: Path) -> None:
    sites = ("linear", "bare", "plain")
    adapted = adapt(make(), "lora", sites=sites, init="pissa")
    disturb(adapted)
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (IDS,), adapters="runtime")
    assert report.max_abs_error < 1e-4
    dora = adapt(make(), "dora", sites=sites)
    with pytest.raises(ConfigError, match=r"site bare has the form 'dora', .*export with adapters='merged'"):
        ac.export_onnx(dora, tmp_path / "other.onnx", (IDS,), adapters="runtime")
    with pytest.raises(ConfigError, match="rescales the weight"):
        ac.save_onnx_adapter(dora, tmp_path / "other.onnx_adapter")
    assert not (tmp_path / "other.onnx").exists()


def test_a_budget_refuses_kinds_without_lambda_and_says_so() -> None:
    adapted = adapt(make(), "lora")
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.01)
    with pytest.raises(BudgetError, match=r"of the kind lora, which has no λ and cannot be pruned.*kind='svd'"):
        ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=1, total_steps=20))


def test_a_budget_on_a_mixture_names_the_sites_that_it_does_not_prune(caplog: pytest.LogCaptureFixture) -> None:
    rules = (ac.AdapterRule(name="linear.weight", kind="lora", rank=3, alpha=6),)
    adapted = adapt(make(), "svd", rules=rules)
    kinds = {a.site.name: (a.form.name, a.rank, a.scale) for a in adapted.plan}
    assert kinds["linear.weight"] == ("lora", 3, 2.0)
    assert kinds["bare"] == ("svd", 2, 0.5)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.01)
    ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=1, total_steps=20))
    assert "1 of 6 sites have no λ (first: linear.weight)" in caplog.text


@pytest.mark.parametrize("init", [None, "pissa"])
def test_a_budget_prunes_and_compacts_dora_over_triplets(init: str | None) -> None:
    model = make()
    adapted = adapt(model, "dora-svd", init=init)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    schedule = ac.BudgetSchedule(target_rank=0.5, total_steps=20, warmup_steps=2, final_steps=5, compact=True)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    target = torch.randn(8, 6)
    for _ in range(20):
        (adapted(IDS) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert budget.live_triplets == 3
    assert 0 in budget.ranks().values()
    expected = adapted(IDS)
    torch.testing.assert_close(expected, run_exact_pissa(adapted, model))
    torch.testing.assert_close(adapted.fold()(IDS), expected, rtol=1e-5, atol=1e-5)


def run_exact_pissa(adapted: ac.AdaptedModel, model: nn.Module) -> Tensor:
    """The formula for triplets whose start is subtracted."""
    weights = {}
    for a in adapted.plan:
        p = dict(adapted.adapters.parameters_of(a))
        weight = model.get_parameter(a.site.name).detach()
        rows = weight.t() if a.site.transposed else weight.flatten(1)
        delta = (p["P"] * p["lam"]) @ p["Q"]
        if "lam_start" in p:
            delta = delta - (p["P_start"] * p["lam_start"]) @ p["Q_start"]
        total = rows + a.scale * delta
        total = p["magnitude"].unsqueeze(1) * total / total.norm(dim=1, keepdim=True).clamp_min(1e-30)
        weights[a.site.name] = (total.t() if a.site.transposed else total).reshape(weight.shape)
    result: Tensor = torch.func.functional_call(model, weights, (IDS,))
    return result
