"""RankBudget: Algorithm 1 of the paper, the exact budget, recovery, and the final phase."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError
from tests.adapter_compiler.training.helpers import (
    assert_same,
    count_nonzero,
    find_lambdas,
    make_adapted,
    run,
    set_gradients,
    snapshot,
)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Algorithm1:
    """Algorithm 1 of arXiv 2303.10512 with SGD, written down from the paper, one parameter at a time."""

    def __init__(self, adapted: ac.AdaptedModel, schedule: ac.BudgetSchedule, lr: float, gamma: float) -> None:
        self.schedule, self.lr, self.gamma = schedule, lr, gamma
        self.values = {name: p.detach().clone() for name, p in adapted.adapters.named_parameters()}
        self.mean = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.unc = {name: torch.zeros_like(value) for name, value in self.values.items()}
        self.sites = [name.removesuffix(".lam") for name in self.values if name.endswith(".lam")]
        self.kept: set[tuple[str, int]] = set()
        self.initial = sum(len(self.values[f"{site}.lam"]) for site in self.sites)

    def regularize(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        leaves = {name: value.clone().requires_grad_() for name, value in self.values.items()}
        total = torch.zeros((), dtype=torch.float64)
        for site in self.sites:
            P, Q = leaves[f"{site}.P"], leaves[f"{site}.Q"]
            for gram in (P.T @ P, Q @ Q.T):
                total = total + (gram - torch.eye(len(gram), dtype=gram.dtype)).square().sum()
        (self.gamma * total).backward()
        extra = {name: leaf.grad for name, leaf in leaves.items()}
        return {n: g if (e := extra[n]) is None else g + e for n, g in gradients.items()}

    def step(self, t: int, gradients: dict[str, Tensor]) -> None:
        gradients = self.regularize(gradients)
        beta1, beta2 = self.schedule.beta1, self.schedule.beta2
        for name, value in self.values.items():
            sensitivity = (value * gradients[name]).abs()
            self.mean[name] = beta1 * self.mean[name] + (1 - beta1) * sensitivity
            self.unc[name] = beta2 * self.unc[name] + (1 - beta2) * (sensitivity - self.mean[name]).abs()
            self.values[name] = value - self.lr * gradients[name]
        end = self.schedule.total_steps - self.schedule.final
        if t == end or (self.schedule.warmup < t < end and t % self.schedule.interval == 0):
            self.rank(t, end)
        if self.kept and (t >= end or t % self.schedule.interval == 0):
            for site in self.sites:
                lam = self.values[f"{site}.lam"]
                lam[[i for i in range(len(lam)) if (site, i) not in self.kept]] = 0

    def rank(self, t: int, end: int) -> None:
        progress = (t - self.schedule.warmup) / (end - self.schedule.warmup)
        target = round((self.schedule.target_rank or 0) * len(self.sites))
        budget = target if t >= end else int(target + (self.initial - target) * (1 - progress) ** 3)
        scores = {}
        for site in self.sites:
            s = {letter: self.mean[f"{site}.{letter}"] * self.unc[f"{site}.{letter}"] for letter in ("P", "lam", "Q")}
            for i, score in enumerate(s["lam"] + s["P"].mean(0) + s["Q"].mean(1)):
                scores[site, i] = float(score)
        self.kept = set(sorted(scores, key=lambda place: -scores[place])[:budget])


@pytest.mark.parametrize("interval", [1, 5])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_paper_semantics_is_algorithm_1(gamma: float, interval: int) -> None:
    adapted = make_adapted(gamma=gamma)
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=40, warmup_steps=6, final_steps=10, interval=interval)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.02)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    reference = Algorithm1(adapted, schedule, lr=0.02, gamma=gamma)
    for t in range(1, 41):
        set_gradients(adapted)
        gradients = {n: p.grad.clone() for n, p in adapted.adapters.named_parameters() if p.grad is not None}
        reference.step(t, gradients)
        optimizer.step()
        for name, parameter in adapted.adapters.named_parameters():
            expected = reference.values[name]
            torch.testing.assert_close(parameter.detach(), expected, rtol=1e-11, atol=1e-13, msg=f"{t} {name}")
            assert torch.equal(parameter != 0, expected != 0), (t, name)
    assert len(budget.history) == (24 if interval == 1 else 5)
    assert budget.live_triplets == 6
    assert len(set(budget.ranks().values())) > 1


@st.composite
def runs(draw: st.DrawFn) -> tuple[tuple[tuple[int, int], ...], int, ac.BudgetSchedule, bool]:
    side = st.integers(1, 6)
    shapes = tuple(draw(st.lists(st.tuples(side, side), min_size=1, max_size=5)))
    rank = draw(st.integers(1, 5))
    semantics = draw(st.sampled_from(["paper", "peft"]))
    warmup, final = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    schedule = ac.BudgetSchedule(
        target_rank=draw(st.floats(1, max(min(rank, min(shape)) for shape in shapes))),
        total_steps=warmup + final + draw(st.integers(1, 10)),
        warmup_steps=warmup,
        final_steps=final,
        interval=draw(st.integers(1, 4)),
        semantics=semantics,
    )
    return shapes, rank, schedule, draw(st.booleans())


@settings(deadline=None, max_examples=40)
@given(case=runs())
def test_exactly_the_budget_lives_after_every_masking(
    case: tuple[tuple[tuple[int, int], ...], int, ac.BudgetSchedule, bool],
) -> None:
    shapes, rank, schedule, is_tied = case
    adapted = make_adapted(shapes, rank=rank)
    if is_tied:
        for parameter in adapted.trainable_parameters():
            parameter.data.fill_(0.5)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-4)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    initial = sum(min(rank, *shape) for shape in shapes)
    target = min(round((schedule.target_rank or 0) * len(shapes)), initial)
    assert (budget.live_triplets, budget.budget) == (initial, initial)
    for number in range(schedule.first_step, schedule.total_steps + schedule.first_step):
        set_gradients(adapted)
        if is_tied:
            for parameter in adapted.trainable_parameters():
                parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        wanted = schedule.budget(number, initial, target)
        assert budget.budget == wanted
        if schedule.is_masking_step(number):
            assert budget.history[-1].step == number
            assert budget.history[-1].budget == budget.live_triplets == count_nonzero(adapted) == wanted
            assert budget.history[-1].ranks == budget.ranks()
        if number >= schedule.freeze_step:
            assert count_nonzero(adapted) == budget.live_triplets == target
    assert budget.is_frozen
    ranks = {name: int(lam.count_nonzero()) for name, lam in find_lambdas(adapted).items()}
    assert budget.ranks() == ranks


def test_ties_are_broken_the_same_way_in_every_run() -> None:
    survivors = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = make_adapted()
        optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
        schedule = ac.BudgetSchedule(target_rank=2, total_steps=10, warmup_steps=0, final_steps=1, interval=3)
        budget = ac.RankBudget(adapted, optimizer, schedule)
        for parameter in adapted.trainable_parameters():
            parameter.data.fill_(1.0)
        for _ in range(10):
            for parameter in adapted.trainable_parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
        survivors.append([(lam != 0).tolist() for lam in find_lambdas(adapted).values()])
        assert budget.live_triplets == 6
    assert survivors[0] == survivors[1]


@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_a_masked_lambda_regrows_and_can_come_back(semantics: str) -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.05)
    schedule = ac.BudgetSchedule(
        target_rank=1, total_steps=40, warmup_steps=0, final_steps=5, interval=10, semantics=semantics
    )
    budget = ac.RankBudget(adapted, optimizer, schedule)
    maskings = iter(run(adapted, optimizer, 40))
    while not budget.history:
        next(maskings)
    pruned = [(name, int(i)) for name, lam in find_lambdas(adapted).items() for i in (lam == 0).nonzero()]
    live = budget.live_triplets
    assert len(pruned) == 12 - live > 0
    next(maskings)
    assert count_nonzero(adapted) == 12, "between maskings λ may grow"
    assert budget.live_triplets == live

    name, triplet = pruned[0]
    while len(budget.history) < 2:
        set_gradients(adapted, 1e-3)
        for letter in ("P", "lam", "Q"):
            parameter = adapted.adapters.get_parameter(f"{name}.{letter}")
            assert parameter.grad is not None
            parameter.grad.select(1 if letter == "P" else 0, triplet).fill_(1.0)
        optimizer.step()
    assert find_lambdas(adapted)[name][triplet] != 0
    assert count_nonzero(adapted) == budget.live_triplets


@pytest.mark.parametrize("semantics", ["paper", "peft"])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("SGD", {"momentum": 0.9, "nesterov": True}),
        ("Adam", {"amsgrad": True}),
        ("AdamW", {"fused": True}),
        ("AdamW", {"foreach": True, "weight_decay": 0.1}),
        ("RMSprop", {"momentum": 0.9}),
        ("Adagrad", {}),
        ("Adafactor", {}),
        ("NAdam", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "plain",
)
def test_final_phase_keeps_pruned_lambdas_exactly_zero(kind: str, options: dict[str, float], semantics: str) -> None:
    """Momentum would move them at once if they were not masked after every step."""
    adapted = make_adapted()
    optimizer = getattr(torch.optim, kind)(adapted.trainable_parameters(), lr=0.01, **options)
    schedule = ac.BudgetSchedule(
        target_rank=2, total_steps=24, warmup_steps=2, final_steps=12, interval=3, semantics=semantics
    )
    budget = ac.RankBudget(adapted, optimizer, schedule)
    survivors: list[list[bool]] = []
    for step in run(adapted, optimizer, 30):
        if step - 1 + schedule.first_step >= schedule.freeze_step:
            assert budget.is_frozen
            alive = [(lam != 0).tolist() for lam in find_lambdas(adapted).values()]
            survivors = survivors or alive
            assert alive == survivors
            assert count_nonzero(adapted) == budget.live_triplets == 6
        else:
            assert not budget.is_frozen
    assert budget.history[-1].step == schedule.freeze_step


@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_target_equal_to_the_initial_rank_prunes_nothing(semantics: str) -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.01)
    schedule = ac.BudgetSchedule(target_rank=4, total_steps=10, interval=2, semantics=semantics)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    for _ in run(adapted, optimizer, 10):
        assert count_nonzero(adapted) == budget.live_triplets == budget.budget == 12
    assert {record.budget for record in budget.history} == {12}


def test_half_precision_adapters_are_ranked_too() -> None:
    """Scores of about 1e-12 must not round to equal values, which would keep all triplets of the first sites."""
    adapted = make_adapted(dtype=torch.bfloat16)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-3)
    schedule = ac.BudgetSchedule(target_rank=1, total_steps=10, warmup_steps=0, final_steps=2, interval=2)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    last = list(find_lambdas(adapted))[-1]
    for _ in range(10):
        set_gradients(adapted, 1e-7)
        for letter in ("P", "lam", "Q"):
            gradient = adapted.adapters.get_parameter(f"{last}.{letter}").grad
            assert gradient is not None
            gradient.mul_(100)
        optimizer.step()
    assert budget.ranks() == {name: 3 if name == last else 0 for name in budget.ranks()}


def test_steps_beyond_the_schedule_give_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=6))
    with caplog.at_level(logging.WARNING, logger="adapter_compiler"):
        for step in run(adapted, optimizer, 10):
            assert ("more than total_steps=6" in caplog.text) is (step > 6)
    assert len(caplog.records) == 1
    assert count_nonzero(adapted) == budget.live_triplets == 6


def test_detached_it_does_nothing_any_more() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=6))
    next(run(adapted, optimizer, 1))
    before = snapshot(adapted, optimizer, budget)["budget"]
    budget.detach()
    for _ in run(adapted, optimizer, 10):
        pass
    assert_same(budget.state_dict(), before)
    assert count_nonzero(adapted) == 12


def test_an_optimizer_that_lacks_one_parameter_is_refused() -> None:
    adapted = make_adapted()
    parameters = adapted.trainable_parameters()
    for left_out in parameters:
        some = [p for p in parameters if p is not left_out]
        with pytest.raises(BudgetError, match=r"does not hold the adapters of 1 of 3 sites \(first: \d\.weight\)"):
            ac.RankBudget(adapted, torch.optim.SGD(some), ac.BudgetSchedule(target_rank=2, total_steps=6))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0.0),
        ({"init": "kaiming"}, 0.0),
        ({"init": "gaussian"}, 0.1),
        ({"init": "pissa"}, 0.0),
        ({"gamma": 0.3}, 0.3),
        ({"init": "gaussian", "gamma": 0}, 0.0),
    ],
)
def test_factors_are_kept_orthonormal_where_lambda_starts_at_zero(options: dict[str, Any], expected: float) -> None:
    adapted = ac.compile_with_adapters(torch.nn.Linear(6, 5), config=ac.AdapterConfig(rank=3, **options))
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=10)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    assert budget.gamma == expected
    state = budget.state_dict()
    with torch.no_grad():
        for lam in find_lambdas(adapted).values():
            lam.fill_(0.5)
    # A budget that is made after the adapters were loaded continues as in the original run.
    later = ac.RankBudget(adapted, torch.optim.SGD(adapted.trainable_parameters(), lr=0.1), schedule)
    later.load_state_dict(state)
    assert later.gamma == expected


def test_the_first_step_chooses_the_regularizer_by_the_values_of_lambda() -> None:
    """Adapters may be initialized after the budget was made; what they learn later does not change the choice."""
    adapted = ac.compile_with_adapters(torch.nn.Linear(6, 5), config=ac.AdapterConfig(rank=3))
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=10))
    x = torch.randn(8, 6)

    def loss(model: torch.nn.Module, batch: Tensor) -> Tensor:
        output: Tensor = model(batch)
        return output.square().sum()

    ac.initialize_adapters(adapted, "gradient_svd", [x], loss)
    for _ in range(2):
        assert budget.gamma == 0.1
        loss(adapted, x).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(lam.any() for lam in find_lambdas(adapted).values())
    assert budget.gamma == budget.state_dict()["gamma"] == 0.1
