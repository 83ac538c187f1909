"""Initialization from data: the papers' statements about the first step, an unchanged base, and no side effects."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.adapters.initializers.eva import IncrementalSvd
from adapter_compiler.errors import ConfigError, SiteError
from adapter_compiler.training.calibration.gradients import find_weight_gradients
from adapter_compiler.training.calibration.start_from_data import decompose_layer_inputs

Batch = tuple[Tensor, Tensor]


class Net(nn.Module):
    """Two linear layers, one stored transposed, with a buffer that a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 14)
        self.norm = nn.BatchNorm1d(14)
        self.down = nn.Parameter(torch.randn(14, 12) / 4)
        self.head = nn.Linear(12, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.norm(self.up(x)) @ self.down))
        return y


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().double()


@pytest.fixture
def batches() -> list[Batch]:
    torch.manual_seed(1)
    return [(torch.randn(16, 10).double(), torch.randn(16, 9).double()) for _ in range(3)]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adapt(model: nn.Module, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(**{"rank": 2, "alpha": 3, "kind": "lora", **options})
    return ac.compile_with_adapters(model, (torch.randn(4, 10).double(),), config=config)


def find_exact_gradients(model: nn.Module, batches: list[Batch]) -> dict[str, Tensor]:
    model = copy.deepcopy(model)
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.dim() == 2}
    return {name: g.t() if name == "down" else g for name, g in found.items() if g is not None}


@pytest.mark.parametrize("at_once", [1, 2, 5])
def test_gradients_are_the_averages_and_there_are_no_side_effects(
    net: nn.Module, batches: list[Batch], at_once: int
) -> None:
    adapted = adapt(net)
    before = copy.deepcopy(adapted.state_dict())
    flags = [p.requires_grad for p in adapted.parameters()]
    adapted.adapters.get_parameter("up.weight.A").grad = torch.ones(2, 10).double()
    expected = find_exact_gradients(net, batches)
    generator = torch.get_rng_state()
    found = {}
    for adapter, gradient in find_weight_gradients(adapted, batches, loss, at_once=at_once):
        found[adapter.site.name] = gradient.clone()
        assert sum(p.grad is not None for p in adapted.module.parameters()) < at_once
    torch.testing.assert_close(found, {name: expected[name] for name in found})
    assert found.keys() == expected.keys()
    torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)
    assert [p.requires_grad for p in adapted.parameters()] == flags
    assert torch.equal(torch.get_rng_state(), generator)
    kept = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert kept == {"adapters.up.weight.A"}


@pytest.mark.parametrize("kind", ["lora", "dora", "svd"])
def test_lora_ga_starts_at_the_base_and_folds_and_reloads(
    kind: str, net: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    before = copy.deepcopy(net.state_dict())
    adapted = adapt(net, kind=kind)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    report = ac.initialize_adapters(adapted, "lora_ga", batches, loss)
    adapted.eval()
    x = batches[0][0]
    torch.testing.assert_close(adapted(x), net.eval()(x), rtol=1e-12, atol=1e-12)
    assert any(p.detach().abs().max() > 0.1 for p in adapted.trainable_parameters())
    loss(adapted, batches[0]).backward()
    optimizer.step()
    torch.testing.assert_close(net.state_dict(), before, rtol=0, atol=0)
    assert not torch.allclose(adapted(x), net(x), rtol=1e-4)
    torch.testing.assert_close(adapted.fold().eval()(x), adapted(x))
    adapted.save(tmp_path)
    other = adapt(net, kind=kind).eval()
    ac.load_adapters(other, tmp_path)
    torch.testing.assert_close(other(x), adapted(x))
    assert report.sites.keys() == {"up.weight", "down", "head.weight"}


def test_the_first_step_of_lora_ga_is_as_near_to_full_fine_tuning_as_rank_2r_can_be(
    net: nn.Module, batches: list[Batch]
) -> None:
    """‖ΔW₁ − ζ·ΔW₁(full)‖ = ζ·√Σ_{i>2r} σ_i², for ζ = s²·c² (theorem 3.1 of the paper), at every site."""
    rate, size = 1e-7, {name: width**0.25 / 4 for name, width in (("up.weight", 14), ("down", 12), ("head.weight", 9))}
    adapted = adapt(net)
    report = ac.initialize_adapters(adapted, "lora_ga", batches[:1], loss)
    gradients = find_exact_gradients(net, batches[:1])
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=rate)
    loss(adapted, batches[0]).backward()
    optimizer.step()
    for adapter in adapted.plan:
        name = adapter.site.name
        gradient, values = gradients[name], torch.linalg.svdvals(gradients[name])
        step = adapter.form.delta(adapted.adapters.parameters_of(adapter), adapter.scale).detach()
        zeta = adapter.scale**2 * size[name] ** 2
        missed = torch.linalg.matrix_norm(step + rate * zeta * gradient)
        bound = rate * zeta * values[4:].square().sum().sqrt()
        torch.testing.assert_close(missed, bound, rtol=1e-5, atol=0)
        expected = values[4:].square().sum() / values.square().sum()
        assert report.sites[name].left_over == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize("use_sign", [False, True])
def test_gradient_svd_gives_lambda_the_singular_values_as_gradient(
    net: nn.Module, batches: list[Batch], use_sign: bool
) -> None:
    adapted = adapt(net, kind="svd")
    expected = {name: torch.linalg.svdvals(g)[:2] for name, g in find_exact_gradients(net, batches).items()}
    report = ac.initialize_adapters(adapted, ac.DataStart(method="gradient_svd", use_sign=use_sign), batches, loss)
    assert torch.equal(adapted.eval()(batches[0][0]), net.eval()(batches[0][0]))
    adapted.train()
    for batch in batches:
        (loss(adapted, batch) / len(batches)).backward()
    for adapter in adapted.plan:
        p = adapted.adapters.parameters_of(adapter)
        torch.testing.assert_close(p["P"].mT @ p["P"], torch.eye(2).double())
        torch.testing.assert_close(p["Q"] @ p["Q"].mT, torch.eye(2).double())
        assert p["lam"].grad is not None
        sigma = torch.tensor(report.sites[adapter.site.name].values).double()
        if use_sign:
            assert (p["lam"].grad > 0).all()
        else:
            torch.testing.assert_close(p["lam"].grad, adapter.scale * expected[adapter.site.name], rtol=1e-5, atol=0)
            torch.testing.assert_close(sigma, expected[adapter.site.name], rtol=1e-6, atol=0)
    ranking = report.ranking()
    assert [value for _, _, value in ranking] == sorted((v for _, _, v in ranking), reverse=True)
    assert len(ranking) == 6


@pytest.mark.parametrize("kind", ["lora", "dora", "svd", "dora-svd"])
def test_lora_one_takes_the_first_step_along_the_gradient(kind: str, net: nn.Module, batches: list[Batch]) -> None:
    """ΔW = −s η G_r / S₀, from torch's decomposition of autograd's gradient; the frozen weights stay."""
    gradients = find_exact_gradients(net, batches)
    before = {name: p.clone() for name, p in net.named_parameters()}
    adapted = adapt(net, kind=kind)
    start = ac.DataStart(method="lora_one", step_size=0.3)
    report = ac.initialize_adapters(adapted, start, batches, loss)
    for adapter in adapted.plan:
        gradient = gradients[adapter.site.weight]
        U, values, V = torch.linalg.svd(gradient, full_matrices=False)
        expected = -adapter.scale * 0.3 * (U[:, :2] * (values[:2] / values[0])) @ V[:2]
        parameters = adapted.adapters.parameters_of(adapter)
        if "dora" not in kind:
            found_delta = adapter.site.to_matrix(adapter.delta(parameters).detach())
            torch.testing.assert_close(found_delta, expected, rtol=1e-10, atol=1e-12)
        right = parameters["Q" if "svd" in kind else "A"]
        torch.testing.assert_close(right @ right.mT, torch.eye(2).double(), rtol=1e-10, atol=1e-12)
        found = report.sites[adapter.site.name]
        assert list(found.values) == pytest.approx(values[:2].tolist())
        assert found.left_over == pytest.approx(float(values[2:].square().sum() / values.square().sum()))
    assert all(torch.equal(p, before[name]) for name, p in adapted.module.named_parameters())
    with torch.no_grad():
        after, at_base = (float(sum(loss(model, batch) for batch in batches)) for model in (adapted, net))
    assert after < at_base


def test_after_lora_one_a_budget_prunes(net: nn.Module, batches: list[Batch]) -> None:
    adapted = adapt(net, kind="svd")
    ac.initialize_adapters(adapted, "lora_one", batches, loss)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-3)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=1, total_steps=6, compact=True))
    for _ in range(6):
        loss(adapted, batches[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert budget.live_triplets == len(adapted.sites)
    torch.testing.assert_close(adapted.fold()(batches[0][0]), adapted(batches[0][0]), rtol=1e-10, atol=1e-10)


def test_a_randomized_decomposition_is_near_the_exact_one(net: nn.Module, batches: list[Batch]) -> None:
    exact = ac.initialize_adapters(adapt(net, kind="svd"), "gradient_svd", batches, loss)
    start = ac.DataStart(method="gradient_svd", iterations=8, at_once=3)
    fast = ac.initialize_adapters(adapt(net, kind="svd"), start, batches, loss)
    for name, site in exact.sites.items():
        assert fast.sites[name].values == pytest.approx(site.values, rel=1e-3)


def test_a_start_that_changes_nothing_takes_back_one_that_did(net: nn.Module, batches: list[Batch]) -> None:
    adapted = adapt(net, kind="svd", init="pissa")
    assert {a.form.name for a in adapted.plan} == {"svd-offset2"}
    ac.initialize_adapters(adapted, "gradient_svd", batches, loss)
    assert {a.form.name for a in adapted.plan} == {"svd"}
    assert all(p.requires_grad for p in adapted.adapters.parameters())
    assert torch.equal(adapted.eval()(batches[0][0]), net.eval()(batches[0][0]))


@pytest.mark.parametrize("kind", ["lora", "dora", "svd"])
def test_eva_finds_the_directions_of_the_inputs(kind: str, net: nn.Module, batches: list[Batch]) -> None:
    adapted = adapt(net.eval(), kind=kind)
    report = ac.initialize_adapters(adapted, "eva", batches, loss)
    x = torch.cat([batch[0] for batch in batches])
    _, values, right = torch.linalg.svd(x, full_matrices=False)
    found = adapted.adapters.get_parameter("up.weight." + ("Q" if kind == "svd" else "A")).detach()
    # Components that are cut off after each batch are lost, so the directions are near, not equal.
    cosines = (found @ right[:2].mT).abs().diagonal()
    assert (cosines > 0.75).all()
    torch.testing.assert_close(found @ found.mT, torch.eye(2).double())
    assert torch.allclose(adapted(x), net(x), atol=1e-12)
    explained = torch.tensor(report.sites["up.weight"].values).double()
    assert (explained <= 1.001 * values[:2].square() / values.square().sum()).all()


class Inputs(nn.Module):
    """One layer of each kind whose inputs can be observed, and one whose inputs cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.convolution = nn.Conv2d(8, 6, (3, 2), stride=(2, 1), padding=1)
        self.narrow = nn.Conv1d(6, 5, 2, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention(x, x, x, need_weights=False)[0]
        y = self.convolution(y.mT.unsqueeze(-1)).flatten(2)
        result: Tensor = self.narrow(y)
        return result


def test_inputs_are_seen_in_attention_and_convolutions() -> None:
    torch.manual_seed(0)
    model, x = Inputs().double().eval(), torch.randn(3, 9, 8).double()
    seen: dict[str, Tensor] = {}
    model.attention.out_proj.register_forward_pre_hook(lambda m, a: None)
    model.convolution.register_forward_pre_hook(lambda m, a: seen.update(convolution=a[0].detach()))
    model.narrow.register_forward_pre_hook(lambda m, a: seen.update(flat=a[0].detach()))
    sites = ("*in_proj_weight", "*out_proj*", "convolution", "narrow")
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2, kind="lora", sites=sites))
    model(x)
    counts = {site.name: site.in_features for site in adapted.sites}
    found = decompose_layer_inputs(adapted, [x], lambda m, batch: m(batch), counts)
    exact = {
        "attention.in_proj_weight": x.flatten(0, 1),
        "convolution.weight": F.unfold(seen["convolution"], (3, 2), stride=(2, 1), padding=1).mT.flatten(0, 1),
        "narrow.weight": torch.cat([seen["flat"][:, :, :-2], seen["flat"][:, :, 2:]], 1).mT.flatten(0, 1),
    }
    for name, rows in exact.items():
        values = torch.linalg.svdvals(rows)
        torch.testing.assert_close(found[name].values[: len(values)], values[: len(found[name].values)])
    assert found["attention.out_proj.weight"].total > 0


@pytest.mark.parametrize("centered", [False, True])
def test_the_incremental_decomposition_is_exact_when_nothing_is_cut_off(centered: bool) -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 6).double() + 1 for n in (5, 1, 9, 4)]
    whole = torch.cat(parts)
    incremental = IncrementalSvd(6, centered=centered)
    for part in parts:
        incremental.add(part)
    rows = whole - whole.mean(0) if centered else whole
    _, values, right = torch.linalg.svd(rows, full_matrices=False)
    torch.testing.assert_close(incremental.values, values)
    torch.testing.assert_close((incremental.components @ right.mT).abs(), torch.eye(6).double())
    torch.testing.assert_close(incremental.explained, values.square() / values.square().sum())


def test_what_cannot_work_says_so(net: nn.Module, batches: list[Batch]) -> None:
    adapted = adapt(net)
    with pytest.raises(ConfigError, match="batches is empty, expected at least one"):
        ac.initialize_adapters(adapted, "lora_ga", [], loss)
    with pytest.raises(ConfigError, match=r"DataStart\(method='magic'\): expected one of 'lora_ga'"):
        ac.initialize_adapters(adapted, "magic", batches, loss)
    with pytest.raises(SiteError, match=r"site down: the loss does not depend on the weight"):
        ac.initialize_adapters(adapted, "lora_ga", batches, lambda m, b: b[0].sum())
    with pytest.raises(SiteError, match=r"site down: the gradient of the weight has inf or nan"):
        ac.initialize_adapters(adapted, "lora_ga", batches, lambda m, b: loss(m, b) * torch.inf)
    with pytest.raises(SiteError, match=r"site down \(one of 3\): the batches use no matrix product"):
        ac.initialize_adapters(adapted, "eva", batches, lambda m, b: b[0].sum())
    with pytest.raises(ConfigError, match=r"init='lora_ga'\) needs batches.*initialize_adapters\(adapted, 'lora_ga'"):
        ac.AdapterConfig(init="lora_ga")
    with pytest.raises(ConfigError, match="expected an AdaptedModel"):
        ac.initialize_adapters(net, "lora_ga", batches, loss)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["dora", "svd"])
def test_a_run_resumes_bit_for_bit_without_looking_at_data_again(
    kind: str, net: nn.Module, batches: list[Batch], tmp_path: Path
) -> None:
    runs = [adapt(net, kind=kind) for _ in range(2)]
    ac.initialize_adapters(runs[0], "lora_ga", batches, loss)
    optimizers = [torch.optim.AdamW(run.parameter_groups(1e-2, lora_plus_ratio=4)) for run in runs]

    def train(number: int, steps: int) -> None:
        for _ in range(steps):
            loss(runs[number], batches[0]).backward()
            optimizers[number].step()
            optimizers[number].zero_grad()

    train(0, 3)
    ac.save_training_state(tmp_path, runs[0], optimizers[0])
    train(0, 2)
    ac.load_training_state(tmp_path, runs[1], optimizers[1])
    train(1, 2)
    torch.testing.assert_close(runs[1].state_dict(), runs[0].state_dict(), rtol=0, atol=0)
    assert torch.equal(runs[1](batches[0][0]), runs[0](batches[0][0]))
