"""Re-diagonalizing changes no output; re-aligning covers the gradient that the adapter missed. LoRA+ groups."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.training.calibration.gradients import find_weight_gradients
from adapter_compiler.training.calibration.realign import measure_alignment
from tests.adapter_compiler.saving.same_bits import assert_same_bits

X = torch.randn(20, 8, generator=torch.Generator().manual_seed(0)).double()
Y = torch.randn(20, 7, generator=torch.Generator().manual_seed(1)).double()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def adapt(kind: str = "svd", rank: int = 3, **options: object) -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 9), nn.Tanh(), nn.Linear(9, 7)).double()
    return ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(rank=rank, alpha=rank, kind=kind, **options))  # type: ignore[arg-type]


@torch.no_grad()
def disturb(adapted: ac.AdaptedModel) -> None:
    for parameter in adapted.trainable_parameters():
        parameter.normal_()


@pytest.mark.parametrize("kind", ["svd", "dora-svd"])
def test_rediagonalizing_keeps_the_function_and_makes_lambda_the_singular_values(kind: str) -> None:
    adapted = adapt(kind)
    disturb(adapted)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters())
    loss(adapted, (X, Y)).backward()
    optimizer.step()
    with torch.no_grad():
        adapted.adapters.get_parameter("0.weight.lam")[1] = 0
    untouched = adapted.adapters.get_parameter("0.weight.P")[:, 1].clone()
    expected = adapted(X)
    assert ac.rediagonalize(adapted, optimizer) == ["0.weight", "2.weight"]
    torch.testing.assert_close(adapted(X), expected, rtol=1e-10, atol=1e-10)
    for adapter in adapted.plan:
        p = adapted.adapters.parameters_of(adapter)
        live = p["lam"] != 0
        eye = torch.eye(int(live.sum())).double()
        torch.testing.assert_close(p["P"][:, live].mT @ p["P"][:, live], eye)
        torch.testing.assert_close(p["Q"][live] @ p["Q"][live].mT, eye)
        sigma = torch.linalg.svdvals(adapter.form.delta(p, 1.0).detach())[: len(eye)]
        torch.testing.assert_close(p["lam"][live].detach(), sigma)
        assert set(optimizer.state[p["lam"]]) == {"step", "exp_avg", "exp_avg_sq"}
    assert torch.equal(adapted.adapters.get_parameter("0.weight.P")[:, 1], untouched)


def rediagonalize_with(
    adapted: ac.AdaptedModel, first: str, second: str | None
) -> tuple[torch.optim.Optimizer, dict[str, dict[str, Tensor]]]:
    """Re-diagonalize with the gradients as first moments and their squares as second ones; what they then were."""
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    loss(adapted, (X, Y)).backward()
    before: dict[str, dict[str, Tensor]] = {}
    for (site, name), p in adapted.adapters.keyed_parameters.items():
        gradient = as_tensor(p.grad).clone()
        optimizer.state[p] = {first: gradient.clone(), **({second: gradient.square()} if second else {})}
        before.setdefault(site, {})[name] = p.detach().clone()
        before[site][f"grad {name}"] = gradient
    ac.rediagonalize(adapted, optimizer)
    adapted.zero_grad()
    loss(adapted, (X, Y)).backward()
    return optimizer, before


def as_tensor(found: Tensor | None) -> Tensor:
    assert found is not None
    return found


@pytest.mark.parametrize("first", ["exp_avg", "momentum_buffer"])
def test_first_moments_that_are_gradients_are_those_of_the_new_factors(first: str) -> None:
    """ΔW does not change, so neither does the gradient of W, and autograd says what P, λ and Q then have."""
    adapted = adapt()
    disturb(adapted)
    optimizer, _ = rediagonalize_with(adapted, first, None)
    for p in adapted.adapters.parameters():
        torch.testing.assert_close(optimizer.state[p][first], p.grad, rtol=1e-10, atol=1e-10)


def test_second_moments_are_sums_with_squared_coefficients() -> None:
    adapted = adapt()
    disturb(adapted)
    optimizer, before = rediagonalize_with(adapted, "exp_avg", "exp_avg_sq")
    for adapter in adapted.plan:
        old, new = before[adapter.site.name], adapted.adapters.parameters_of(adapter)
        # P' = P A and Q' = B Q; gradients are transformed by the inverse transposes.
        A = torch.linalg.lstsq(old["P"], new["P"].detach()).solution
        B = torch.linalg.lstsq(old["Q"].mT, new["Q"].detach().mT).solution.mT
        T, S = torch.linalg.inv(A).mT, torch.linalg.inv(B).mT
        v_P, v_Q = torch.zeros_like(old["P"]), torch.zeros_like(old["Q"])
        for j in range(3):
            for k in range(3):
                v_P[:, j] += old["grad P"][:, k] ** 2 * T[k, j] ** 2
                v_Q[j] += old["grad Q"][k] ** 2 * S[j, k] ** 2
        v_lam = (new["P"].detach().square() * v_P).sum(0) / new["lam"].detach().square()
        for name, expected in (("P", v_P), ("Q", v_Q), ("lam", v_lam)):
            torch.testing.assert_close(optimizer.state[new[name]]["exp_avg_sq"], expected, rtol=1e-8, atol=1e-10)


def test_a_triplet_that_starts_again_has_no_momentum_and_the_mean_second_moment() -> None:
    adapted = adapt()
    disturb(adapted)
    with torch.no_grad():
        for site in ("0.weight", "2.weight"):  # two parallel triplets of three
            adapted.adapters.get_parameter(f"{site}.P")[:, 2] = adapted.adapters.get_parameter(f"{site}.P")[:, 0]
            adapted.adapters.get_parameter(f"{site}.Q")[2] = adapted.adapters.get_parameter(f"{site}.Q")[0]
    optimizer, _ = rediagonalize_with(adapted, "exp_avg", "exp_avg_sq")
    for adapter in adapted.plan:
        new = adapted.adapters.parameters_of(adapter)
        assert float(new["lam"].detach()[2]) == 1
        assert not new["P"][:, 2].any()
        for name, dim in (("P", 1), ("lam", 0), ("Q", 0)):
            first, second = (optimizer.state[new[name]][key] for key in ("exp_avg", "exp_avg_sq"))
            assert not first.select(dim, 2).any()
            mean = second.index_select(dim, torch.tensor([0, 1])).mean(dim)
            torch.testing.assert_close(second.select(dim, 2), mean)
        # The others have their gradients.
        torch.testing.assert_close(optimizer.state[new["P"]]["exp_avg"][:, :2], as_tensor(new["P"].grad)[:, :2])


def test_pruned_triplets_keep_their_moments_and_unknown_states_are_deleted() -> None:
    adapted = adapt()
    disturb(adapted)
    P, lam = (adapted.adapters.get_parameter(f"0.weight.{name}") for name in ("P", "lam"))
    with torch.no_grad():
        lam[1] = 0
    optimizer, before = rediagonalize_with(adapted, "exp_avg", "exp_avg_sq")
    assert torch.equal(optimizer.state[P]["exp_avg"][:, 1], before["0.weight"]["grad P"][:, 1])
    optimizer.state[P]["exp_avg_factored"] = torch.zeros(3)
    with torch.no_grad():
        P.mul_(2)
    ac.rediagonalize(adapted, optimizer)
    assert P not in optimizer.state
    assert lam not in optimizer.state
    assert adapted.adapters.get_parameter("2.weight.P") in optimizer.state


@pytest.mark.parametrize("rule", ["muon", "triplet"])
def test_the_adapter_optimizers_go_on(rule: str) -> None:
    adapted = adapt()
    optimizer = ac.make_optimizer(adapted, 0.01, rule=rule)
    realigner = ac.Realigner(adapted, optimizer, realign_every=2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(adapted, (X, Y))
        value.backward()
        losses.append(float(value.detach()))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    assert all(p in optimizer.state for p in adapted.adapters.parameters())
    assert realigner.step == 30


def find_gradients(adapted: ac.AdaptedModel) -> dict[str, float]:
    """The norm of all gradients at each site."""
    adapted.zero_grad()
    loss(adapted, (X, Y)).backward()
    norms = {}
    for adapter in adapted.plan:
        parameters = adapted.adapters.parameters_of(adapter).values()
        norms[adapter.site.name] = sum(float(p.grad.norm()) for p in parameters if p.grad is not None)
    return norms


@pytest.mark.parametrize("kind", ["svd", "dora-svd"])
def test_rediagonalizing_at_the_default_start_changes_nothing(kind: str) -> None:
    adapted = adapt(kind)
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.0)
    loss(adapted, (X, Y)).backward()
    optimizer.step()
    before = copy.deepcopy(adapted.state_dict())
    assert ac.rediagonalize(adapted, optimizer) == []
    torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)
    assert len(optimizer.state) == len(adapted.trainable_parameters())
    assert all(norm > 1e-4 for norm in find_gradients(adapted).values())
    adapted.adapters.get_parameter("0.weight.lam").detach()[0] = 0
    assert ac.rediagonalize(adapted, optimizer) == []
    torch.testing.assert_close(adapted.adapters.get_parameter("0.weight.lam"), torch.tensor([0.0, 1, 1]).double())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dead", ["P", "Q", "parallel", "one of the default start"])
def test_unused_triplets_can_still_learn(dead: str, dtype: torch.dtype) -> None:
    adapted = adapt().to(dtype)
    disturb(adapted)
    for adapter in adapted.plan:
        P, lam, Q = adapted.adapters.parameters_of(adapter).values()
        with torch.no_grad():
            if dead == "parallel":
                Q[1] = Q[0]
                P[:, 1] = P[:, 0]
            elif dead == "Q":
                Q[1] = 0
            else:
                P[:, 1] = 0
            lam[1] = 1
    deltas = {a.site.name: a.delta(adapted.adapters.parameters_of(a)).detach().double() for a in adapted.plan}
    assert ac.rediagonalize(adapted) == ["0.weight", "2.weight"]
    rounding = 8 * torch.finfo(dtype).eps
    for adapter in adapted.plan:
        p = {key: value.detach().double() for key, value in adapted.adapters.parameters_of(adapter).items()}
        assert not p["P"][:, 2].any()
        assert float(p["lam"][2]) == 1
        torch.testing.assert_close(p["Q"] @ p["Q"].mT, torch.eye(3).double(), atol=rounding, rtol=0)
        expected = deltas[adapter.site.name]
        delta = adapter.delta(p)
        torch.testing.assert_close(delta, expected, atol=4 * rounding * float(expected.abs().max()), rtol=0)
    if dtype == torch.float64:
        find_gradients(adapted)
        gradients = [adapted.adapters.get_parameter(f"{site}.P").grad for site in ("0.weight", "2.weight")]
        assert all(gradient is not None and bool(gradient[:, 2].any()) for gradient in gradients)


def test_values_that_half_precision_cannot_hold_set_no_lambda_to_zero() -> None:
    adapted = adapt().to(torch.float16)
    for adapter in adapted.plan:
        P, lam, Q = adapted.adapters.parameters_of(adapter).values()
        with torch.no_grad():
            P.zero_()[0, 0] = 1e-4
            lam.fill_(1e-4)
            Q.fill_(1)
    ac.rediagonalize(adapted)
    assert all(bool(adapted.adapters.get_parameter(f"{site}.lam").all()) for site in adapted.adapters.prunable_sites)


def test_a_step_after_rediagonalizing_at_the_start_learns() -> None:
    adapted = adapt()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.5)
    realigner = ac.Realigner(adapted, optimizer, realign_every=1)
    realigner.realign()
    losses = []
    for _ in range(40):
        assert all(norm > 0 for norm in find_gradients(adapted).values())
        losses.append(float(loss(adapted, (X, Y)).detach()))
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_a_realigner_aligns_a_new_adapter_with_the_gradient() -> None:
    adapted = adapt()
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.0)
    loss(adapted, (X, Y)).backward()
    optimizer.step()
    before = adapted(X)
    realigner = ac.Realigner(adapted, optimizer, realign_every=1, batches=[(X, Y)], loss=loss, threshold=2.0)
    assert realigner.realign() == ["0.weight", "2.weight"]
    assert len(optimizer.state) == 0
    torch.testing.assert_close(adapted(X), before, rtol=0, atol=0)
    find_gradients(adapted)
    for adapter, gradient in find_weight_gradients(adapted, [(X, Y)], loss, with_adapters=True):
        found = adapted.adapters.get_parameter(f"{adapter.site.name}.P").grad
        assert found is not None
        torch.testing.assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(gradient)[:3])


class Noisy(nn.Module):
    """Draws random numbers, so that other draws in between change its results."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(8, 9), nn.Dropout(0.2), nn.Linear(9, 7)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.drop(torch.tanh(self.up(x))))
        return y


class RealignedRun:
    """A run with a realigner, with or without a budget that compacts."""

    steps = 10

    def __init__(self, *, with_batches: bool, with_budget: bool) -> None:
        torch.manual_seed(3)
        self.adapted = ac.compile_with_adapters(Noisy().double(), (X,), config=ac.AdapterConfig(rank=4, alpha=4))
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=0.02)
        schedule = ac.BudgetSchedule(
            target_rank=2, total_steps=self.steps, warmup_steps=1, final_steps=3, interval=2, compact=True
        )
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule) if with_budget else None
        batches = {"batches": [(X, Y), (X + 1, Y)], "loss": loss} if with_batches else {}
        self.realigner = ac.Realigner(self.adapted, self.optimizer, realign_every=3, threshold=1.5, **batches)  # type: ignore[arg-type]

    def advance(self, steps: int) -> None:
        for _ in range(steps):
            loss(self.adapted, (X, Y)).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def snapshot(self) -> dict[str, object]:
        return {
            "model": copy.deepcopy(self.adapted.state_dict()),
            "optimizer": copy.deepcopy(self.optimizer.state_dict()),
            "budget": None if self.budget is None else self.budget.state_dict(),
            "realigner": self.realigner.state_dict(),
            "random": torch.get_rng_state(),
        }


@pytest.mark.parametrize("with_budget", [True, False], ids=["budget", "alone"])
@pytest.mark.parametrize("with_batches", [True, False], ids=["batches", "no batches"])
def test_a_run_resumes_bit_for_bit(with_batches: bool, with_budget: bool, tmp_path: Path) -> None:
    options = {"with_batches": with_batches, "with_budget": with_budget}
    whole = RealignedRun(**options)
    for step in range(RealignedRun.steps + 1):
        others = {"realigner": whole.realigner}
        ac.save_training_state(tmp_path / str(step), whole.adapted, whole.optimizer, whole.budget, **others)
        whole.advance(step < RealignedRun.steps)
    assert whole.realigner.step == RealignedRun.steps
    assert bool(whole.realigner.alignment) == with_batches
    assert [step for step, _ in whole.realigner.history] == ([3, 6, 9] if with_batches else [])
    expected = whole.snapshot()
    for step in range(RealignedRun.steps + 1):
        again = RealignedRun(**options)
        torch.manual_seed(999)
        others = {"realigner": again.realigner}
        ac.load_training_state(tmp_path / str(step), again.adapted, again.optimizer, again.budget, **others)
        again.advance(RealignedRun.steps - step)
        assert_same_bits(again.snapshot(), expected, f"stopped at {step}")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "the Realigner's state has version=2, this one has version=1"),
        ({"every": 4}, "the Realigner's state has every=4, this one has every=3; resume with the same options"),
        ({"threshold": 0.1}, "the Realigner's state has threshold=0.1, this one has threshold=1.5"),
        ({"batches": 3}, "the Realigner's state has batches=3, this one has batches=2"),
        ({"step": -1}, "the Realigner's state has step=-1 and alignment={}, expected a number of steps"),
        ({"step": None}, "the Realigner's state has step=None and"),
        ({"alignment": {"9.weight": 1.0}}, "alignment={'9.weight': 1.0}, expected a number of steps and numbers by"),
        ({"history": [[3, {"9.weight": 1.0}]]}, "the Realigner's state has history=.*expected a list of steps"),
        ({"history": {}}, "the Realigner's state has history={}, expected a list of steps"),
        ({"alignment": [1]}, r"alignment=\[1\], expected a number of steps and numbers by site"),
    ],
)
def test_a_state_of_another_realigner_is_refused(changes: dict[str, object], message: str) -> None:
    run = RealignedRun(with_batches=True, with_budget=False)
    run.realigner.load_state_dict(run.realigner.state_dict() | {"step": 2})
    before = run.realigner.state_dict()
    with pytest.raises(CheckpointError, match=message):
        run.realigner.load_state_dict(before | changes)
    assert run.realigner.state_dict() == before


def test_a_state_from_before_there_was_a_history_is_read() -> None:
    run = RealignedRun(with_batches=True, with_budget=False)
    run.advance(3)
    state = {key: value for key, value in run.realigner.state_dict().items() if key != "history"}
    run.realigner.load_state_dict(state)
    assert run.realigner.history == []
    assert run.realigner.step == 3


def test_a_realigner_covers_the_gradient_that_was_missed() -> None:
    adapted = adapt()
    disturb(adapted)
    with torch.no_grad():
        for site in ("0.weight", "2.weight"):
            adapted.adapters.get_parameter(f"{site}.lam")[1:] = 0
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    realigner = ac.Realigner(adapted, optimizer, realign_every=2, batches=[(X, Y)], loss=loss, threshold=2.0)
    before = adapted(X)
    optimizer.step()
    assert realigner.alignment == {}
    optimizer.step()
    torch.testing.assert_close(adapted(X), before, rtol=1e-10, atol=1e-10)
    assert realigner.alignment.keys() == {"0.weight", "2.weight"}
    loss(adapted, (X, Y)).backward()
    for adapter, gradient in find_weight_gradients(adapted, [(X, Y)], loss, with_adapters=True):
        p = adapted.adapters.parameters_of(adapter)
        P, Q = p["P"].detach(), p["Q"].detach()
        torch.testing.assert_close(P.mT @ P, torch.eye(3).double())
        outside = gradient - P[:, :1] @ (P[:, :1].mT @ gradient)
        outside = outside - outside @ Q[:1].mT @ Q[:1]
        expected = torch.linalg.svdvals(outside)[:2]
        assert p["lam"].grad is not None
        torch.testing.assert_close(p["lam"].grad[1:].abs(), expected)
        assert measure_alignment(P, Q, gradient) > realigner.alignment[adapter.site.name]


def test_an_alignment_above_the_threshold_changes_nothing() -> None:
    adapted = adapt()
    disturb(adapted)
    with torch.no_grad():
        adapted.adapters.get_parameter("0.weight.lam")[1:] = 0
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    realigner = ac.Realigner(adapted, optimizer, realign_every=1, batches=[(X, Y)], loss=loss, threshold=0.0)
    assert realigner.realign() == []
    realigner.detach()
    optimizer.step()
    assert realigner.step == 0


def test_what_cannot_work_says_so() -> None:
    adapted = adapt()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    with pytest.raises(ConfigError, match=r"realign_every=0\): expected an integer of at least 1"):
        ac.Realigner(adapted, optimizer, realign_every=0)
    with pytest.raises(ConfigError, match="one of batches and loss"):
        ac.Realigner(adapted, optimizer, realign_every=1, loss=loss)
    lora = adapt("lora")
    with pytest.raises(ConfigError, match="no adapter has a λ"):
        ac.Realigner(lora, torch.optim.SGD(lora.trainable_parameters(), lr=0.1), realign_every=1)
    with pytest.raises(ConfigError, match=r"lora_plus_ratio=0.5\): expected a number of at least 1"):
        adapted.parameter_groups(1e-3, lora_plus_ratio=0.5)


def test_lambda_has_a_rate_of_its_own() -> None:
    adapted = adapt()
    rates = {}
    for group in adapted.parameter_groups(1e-3, lam_ratio="sqrt", weight_decay=0.1):
        rates.update({id(p): (group["lr"], group["weight_decay"]) for p in group["params"]})
    found = {key: rates[id(p)] for key, p in adapted.adapters.keyed_parameters.items()}
    assert found["0.weight", "lam"] == (pytest.approx(1e-3 * 3), 0.0)  # 9 rows
    assert found["2.weight", "lam"] == (pytest.approx(1e-3 * 7**0.5), 0.0)  # 7 rows
    assert {found[site, name] for site in ("0.weight", "2.weight") for name in "PQ"} == {(1e-3, 0.1)}
    (group,) = [g for g in adapted.parameter_groups(1e-3, lam_ratio=5) if g["name"] == "lam"]
    assert group["lr"] == pytest.approx(5e-3)
    assert len(group["params"]) == 2
    wrong: Any
    for wrong in (-1.0, "root", None):
        with pytest.raises(ConfigError, match=r"lam_ratio=.*\): expected a number of at least 0, or 'sqrt'"):
            adapted.parameter_groups(1e-3, lam_ratio=wrong)


def test_with_the_root_of_the_rows_a_first_step_of_lambda_is_as_long_as_one_of_a_factor() -> None:
    """‖ΔW‖ after one step of Adam from λ = 0 between orthonormal factors, and from B = 0 with orthonormal A."""
    lengths = {}
    ratios: dict[str, float | str] = {"svd": "sqrt", "lora": 1.0}
    for kind, ratio in ratios.items():
        adapted = adapt(kind, init="orthogonal")
        if kind == "svd":
            ac.initialize_adapters(adapted, "gradient_svd", [(X, Y)], loss)
        optimizer = torch.optim.Adam(adapted.parameter_groups(1e-3, lam_ratio=ratio))
        for group in optimizer.param_groups:
            group["lr"] *= group["name"] != "right"
        loss(adapted, (X, Y)).backward()
        optimizer.step()
        (first,) = adapted.plan.by_weight["0.weight"]
        lengths[kind] = float(first.delta(adapted.adapters.parameters_of(first)).norm().detach())
    expected = pytest.approx(1e-3 * (9 * 3) ** 0.5, rel=1e-3)
    assert lengths == {"svd": expected, "lora": expected}


@pytest.mark.parametrize("kind", ["lora", "svd", "dora", "dora-svd"])
def test_the_left_factor_learns_faster(kind: str) -> None:
    adapted = adapt(kind, exclude="2", trainable="2", init="pissa")
    groups = adapted.parameter_groups(1e-3, lora_plus_ratio=16, weight_decay=0.1)
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in adapted.trainable_parameters())
    names = {id(p): name.rpartition(".")[2] for name, p in adapted.named_parameters()}
    found = {
        group["name"]: (group["lr"], group["weight_decay"], {names[id(p)] for p in group["params"]}) for group in groups
    }
    left, right = ("P", "Q") if "svd" in kind else ("B", "A")
    plain = {"bias"} | ({"lam"} if "svd" in kind else set()) | ({"magnitude"} if "dora" in kind else set())
    assert found == {
        "left": (0.016, 0.1, {left}),
        "right": (0.001, 0.1, {right, "weight"}),
        "without decay": (0.001, 0.0, plain),
    }
    torch.optim.AdamW(groups)
