"""What users do around an optimizer step: loss scaling, accumulation, clipping, missing and broken gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import NonFiniteGradientError
from tests.adapter_compiler.training.helpers import (
    assert_same,
    count_nonzero,
    find_lambdas,
    make_adapted,
    run,
    set_gradients,
    snapshot,
)

SEMANTICS = pytest.mark.parametrize("semantics", ["paper", "peft"])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def make_schedule(semantics: str = "paper", total_steps: int = 20) -> ac.BudgetSchedule:
    return ac.BudgetSchedule(
        target_rank=2, total_steps=total_steps, warmup_steps=2, final_steps=6, interval=3, semantics=semantics
    )


def scaled_loss(adapted: ac.AdaptedModel, step: int) -> Tensor:
    """A loss whose gradient is normal noise that depends only on the step."""
    torch.manual_seed(step)
    products = [(p * torch.randn_like(p)).sum() for p in adapted.trainable_parameters()]
    return torch.stack(products).sum()


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "fused Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, fused=True),
}


@SEMANTICS
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("unscales", [True, False], ids=["unscale", "step"])
def test_a_scaled_run_with_skipped_steps_is_the_plain_run(kind: str, semantics: str, unscales: bool) -> None:
    """Scales are powers of two, so gradients, averages, masks and parameters agree bit for bit."""
    plain = make_adapted(gamma=0.1, dtype=torch.float32)
    scaled = copy.deepcopy(plain)
    plain_optimizer, optimizer = (OPTIMIZERS[kind](adapted.trainable_parameters()) for adapted in (plain, scaled))
    plain_budget = ac.RankBudget(plain, plain_optimizer, make_schedule(semantics))
    budget = ac.RankBudget(scaled, optimizer, make_schedule(semantics))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=7)
    taken = 0
    for attempt in range(25):
        optimizer.zero_grad()
        overflows = attempt % 5 == 1
        loss = scaled_loss(scaled, taken)
        scaler.scale(loss).backward()
        if overflows:
            victim = scaled.trainable_parameters()[attempt % 9]
            assert victim.grad is not None
            victim.grad.view(-1)[0] = float("inf")
        before = snapshot(scaled, optimizer, budget)
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        if overflows:
            assert_same(snapshot(scaled, optimizer, budget), before)
            continue
        plain_optimizer.zero_grad()
        scaled_loss(plain, taken).backward()
        plain_optimizer.step()
        taken += 1
        assert budget.step == plain_budget.step == taken
        assert_same(snapshot(scaled, optimizer, budget), snapshot(plain, plain_optimizer, plain_budget))
    assert taken == 20
    assert count_nonzero(scaled) == budget.live_triplets == 6


@SEMANTICS
def test_accumulated_gradients_are_one_step(semantics: str) -> None:
    adapted = make_adapted()
    whole = copy.deepcopy(adapted)
    optimizer, whole_optimizer = (torch.optim.SGD(a.trainable_parameters(), lr=0.01) for a in (adapted, whole))
    budget = ac.RankBudget(adapted, optimizer, make_schedule(semantics))
    whole_budget = ac.RankBudget(whole, whole_optimizer, make_schedule(semantics))
    for step in range(20):
        optimizer.zero_grad()
        whole_optimizer.zero_grad()
        for micro in range(4):
            (scaled_loss(adapted, 100 * step + micro) / 4).backward()
        assert budget.step == step
        torch.stack([scaled_loss(whole, 100 * step + micro) for micro in range(4)]).mean().backward()
        optimizer.step()
        whole_optimizer.step()
        torch.testing.assert_close(adapted.state_dict(), whole.state_dict(), rtol=1e-10, atol=1e-12)
    assert budget.history == whole_budget.history
    assert budget.live_triplets == 6


def test_regularizer_comes_after_clipping() -> None:
    """Only the task's gradient is clipped; the step uses it plus the whole gradient of the regularizer."""
    adapted = make_adapted(gamma=0.5)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1.0)
    ac.RankBudget(adapted, optimizer, make_schedule())
    set_gradients(adapted, 100.0)
    torch.nn.utils.clip_grad_norm_(adapted.trainable_parameters(), 1e-3)
    expected = {}
    for name, p in adapted.adapters.named_parameters():
        assert p.grad is not None
        w, eye = p.detach(), torch.eye(4, dtype=p.dtype)
        regularizer = torch.zeros_like(w)
        if name.endswith("P"):
            regularizer = 4 * 0.5 * w @ (w.T @ w - eye)
        elif name.endswith("Q"):
            regularizer = 4 * 0.5 * (w @ w.T - eye) @ w
        expected[name] = w - p.grad - regularizer
    optimizer.step()
    torch.testing.assert_close({n: p.detach() for n, p in adapted.adapters.named_parameters()}, expected)


@SEMANTICS
def test_a_site_without_gradients_scores_zero_and_goes_first(semantics: str) -> None:
    adapted = make_adapted(gamma=0.1)
    idle = next(iter(find_lambdas(adapted)))
    before = {n: p.detach().clone() for n, p in adapted.adapters.named_parameters() if n.startswith(idle)}
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.01)
    budget = ac.RankBudget(adapted, optimizer, make_schedule(semantics))
    for _ in range(20):
        set_gradients(adapted)
        for name, parameter in adapted.adapters.named_parameters():
            if name.startswith(idle):
                parameter.grad = None
        optimizer.step()
    assert budget.ranks()[idle] == 0
    assert budget.live_triplets == 6
    for name, value in before.items():
        expected = torch.zeros_like(value) if name.endswith("lam") else value
        assert torch.equal(adapted.adapters.get_parameter(name), expected)


def test_steps_without_any_gradient_count_and_keep_the_budget() -> None:
    adapted = make_adapted(gamma=0.1)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    for _ in range(20):
        optimizer.step()
    assert (budget.step, budget.live_triplets, count_nonzero(adapted)) == (20, 6, 6)


def test_groups_with_their_own_learning_rates() -> None:
    adapted = make_adapted()
    named = dict(adapted.adapters.named_parameters())
    groups = [
        {"params": [p for name, p in named.items() if name.endswith(letter)], "lr": lr}
        for letter, lr in (("P", 0.08), ("lam", 0.01), ("Q", 0.0))
    ]
    before = {name: p.detach().clone() for name, p in named.items()}
    optimizer = torch.optim.SGD(groups, lr=0.5)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    for _ in run(adapted, optimizer, 20):
        pass
    assert budget.live_triplets == count_nonzero(adapted) == 6
    assert all(torch.equal(p, before[name]) is name.endswith("Q") for name, p in named.items())


def closure_of(adapted: ac.AdaptedModel, step: int) -> Callable[[], Any]:
    """The closure that users and Lightning pass to ``step``: zero_grad, loss, backward."""

    def closure() -> Any:
        for parameter in adapted.trainable_parameters():
            parameter.grad = None
        loss = scaled_loss(adapted, step)
        loss.backward()
        return loss

    return closure


@SEMANTICS
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("by_name", [False, True])
def test_a_run_with_closures_is_the_plain_run(kind: str, semantics: str, by_name: bool) -> None:
    runs = []
    for with_closure in (False, True):
        torch.manual_seed(0)
        adapted = make_adapted(gamma=0.1, dtype=torch.float32)
        optimizer = OPTIMIZERS[kind](adapted.trainable_parameters())
        budget = ac.RankBudget(adapted, optimizer, make_schedule(semantics))
        for step in range(20):
            closure = closure_of(adapted, step)
            if not with_closure:
                closure()
                optimizer.step()
            else:
                loss: Any = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert isinstance(loss, Tensor)
        assert (budget.step, budget.live_triplets) == (20, 6)
        runs.append(snapshot(adapted, optimizer, budget))
    assert_same(runs[1], runs[0])


@SEMANTICS
def test_an_optimizer_that_calls_its_closure_often(semantics: str) -> None:
    """L-BFGS: every evaluation includes the regularizer, and the scores are updated once a step."""
    adapted = make_adapted(gamma=0.1)
    optimizer = torch.optim.LBFGS(adapted.trainable_parameters(), lr=0.01, max_iter=3)
    budget = ac.RankBudget(adapted, optimizer, make_schedule(semantics))
    calls, gaps = 0, []

    def closure() -> Any:
        nonlocal calls
        calls += 1
        optimizer.zero_grad()
        loss = torch.stack([(p - 0.1).square().sum() for p in adapted.trainable_parameters()]).sum()
        loss.backward()
        return loss

    for _ in range(20):
        optimizer.step(closure)
        P = adapted.adapters.get_parameter("0.weight.P")
        gaps.append(bool(P.grad is not None and not torch.equal(P.grad, 2 * (P - 0.1))))
    assert calls > 40
    assert all(gaps[:5])
    assert (budget.step, budget.live_triplets, count_nonzero(adapted)) == (20, 6, 6)


def test_a_closure_that_fails_changes_nothing() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    before = snapshot(adapted, optimizer, budget)

    def closure() -> float:
        set_gradients(adapted, float("inf"))
        return 0.0

    with pytest.raises(NonFiniteGradientError, match="at step 1"):
        optimizer.step(closure)
    assert_same(snapshot(adapted, optimizer, budget), before)


def test_no_closure_is_no_closure() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.01)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    set_gradients(adapted)
    optimizer.step(None)
    optimizer.step(closure=None)
    assert budget.step == 2


@SEMANTICS
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize(("letter", "symbol"), [("lam", "λ"), ("P", "P"), ("Q", "Q")])
@pytest.mark.parametrize("kind", ["AdamW", "fused AdamW"])
def test_a_broken_gradient_is_named_and_changes_nothing(
    kind: str, letter: str, symbol: str, value: float, semantics: str
) -> None:
    adapted = make_adapted(gamma=0.1, dtype=torch.float32)
    optimizer = OPTIMIZERS[kind](adapted.trainable_parameters())
    budget = ac.RankBudget(adapted, optimizer, make_schedule(semantics))
    for _ in run(adapted, optimizer, 9):
        pass
    broken = adapted.adapters.get_parameter(f"1.weight.{letter}")
    assert broken.grad is not None
    broken.grad.view(-1)[1] = value
    gradients = [p.grad.clone() for p in adapted.trainable_parameters() if p.grad is not None]
    before = snapshot(adapted, optimizer, budget)
    message = (
        rf"site 1\.weight: the gradient of {symbol} has inf or nan at step 10, expected finite values; nothing was"
    )
    with pytest.raises(NonFiniteGradientError, match=message):
        optimizer.step()
    assert_same(snapshot(adapted, optimizer, budget), before)
    assert_same([p.grad for p in adapted.trainable_parameters()], gradients)
    for _ in run(adapted, optimizer, 11):
        pass
    assert (budget.step, budget.live_triplets) == (20, 6)


def test_gradients_too_large_for_float32_are_finite_in_float64() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-300)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    set_gradients(adapted, 1e100)
    optimizer.step()
    assert budget.step == 1


def test_the_budget_follows_a_learning_rate_scheduler() -> None:
    """It replaces optimizer.step by a counting function; the hooks must still run."""
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.01)
    rates: Any = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    for _ in run(adapted, optimizer, 19):
        rates.step()
    assert (budget.step, budget.live_triplets) == (19, 6)


def test_the_optimizer_alone_keeps_the_budget_alive() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    ac.RankBudget(adapted, optimizer, make_schedule())
    for _ in run(adapted, optimizer, 20):
        pass
    assert count_nonzero(adapted) == 6
