"""Several optimizers, optimizers inside others, copies of the weights, and what cannot work."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError
from tests.adapter_compiler.training.helpers import (
    assert_same,
    count_nonzero,
    find_lambdas,
    make_adapted,
    set_gradients,
    snapshot,
)


def make_schedule(**options: Any) -> ac.BudgetSchedule:
    chosen = {"target_rank": 2, "total_steps": 12, "warmup_steps": 1, "final_steps": 4, "interval": 2, **options}
    return ac.BudgetSchedule(**chosen)


def split(adapted: ac.AdaptedModel) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """λ, and P and Q."""
    named = dict(adapted.adapters.named_parameters())
    return [p for n, p in named.items() if n.endswith("lam")], [p for n, p in named.items() if not n.endswith("lam")]


def step(adapted: ac.AdaptedModel, *optimizers: Any, seed: int) -> None:
    torch.manual_seed(seed)
    set_gradients(adapted)
    for optimizer in optimizers:
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad()


class Wrapper(torch.optim.Optimizer):
    """As Accelerate's: an Optimizer by class, without its attributes."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        return self.optimizer.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.optimizer.step(closure)


class Sam(torch.optim.Optimizer):
    """Two steps of which the first is undone: only what is inside steps."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, {"lr": 1e-2})
        self.base_optimizer = torch.optim.AdamW(self.param_groups, lr=1e-2)
        self.param_groups = self.base_optimizer.param_groups

    def first_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["old_p"] = parameter.data.clone()
            parameter.data.add_(parameter.grad, alpha=0.05)

    def second_step(self) -> None:
        for parameter in self.param_groups[0]["params"]:
            parameter.data.copy_(self.state[parameter]["old_p"])
        self.base_optimizer.step()


@pytest.mark.parametrize("semantics", ["paper", "peft"])
@pytest.mark.parametrize("order", ["lambda first", "lambda last"])
@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_two_optimizers_are_as_one(semantics: str, order: str, compact: bool) -> None:
    one, two = make_adapted(gamma=0.1), make_adapted(gamma=0.1)
    two.load_state_dict(one.state_dict())
    schedule = make_schedule(semantics=semantics, compact=compact)
    whole = torch.optim.AdamW([*split(one)[0], *split(one)[1]], lr=1e-2)
    parts = [torch.optim.AdamW(part, lr=1e-2) for part in split(two)]
    parts = parts if order == "lambda first" else parts[::-1]
    first, second = ac.RankBudget(one, whole, schedule), ac.RankBudget(two, parts, schedule)
    for number in range(12):
        step(one, whole, seed=number)
        step(two, *parts, seed=number)
    assert second.step == 12
    assert second.history == first.history
    assert_same(snapshot(two, parts[0], second)["model"], snapshot(one, whole, first)["model"])


def test_an_optimizer_that_is_left_out_once_does_not_shift_the_rounds() -> None:
    adapted = make_adapted()
    lam, others = split(adapted)
    first, second = torch.optim.SGD(lam, lr=1e-3), torch.optim.SGD(others, lr=1e-3)
    budget = ac.RankBudget(adapted, [first, second], make_schedule())
    for number in range(6):
        step(adapted, *([second] if number == 2 else [first, second]), seed=number)
        first.zero_grad()
    assert budget.step == 6


@pytest.mark.parametrize("kind", ["plain", "wrapper", "scheduler", "list"])
def test_what_is_inside_steps(kind: str) -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    wrapper = Wrapper(optimizer)
    given: dict[str, Any] = {
        "plain": optimizer,
        "wrapper": wrapper,
        "scheduler": torch.optim.lr_scheduler.ConstantLR(optimizer),
        "list": [wrapper, optimizer],
    }
    budget = ac.RankBudget(adapted, given[kind], make_schedule(compact=True))
    for number in range(12):
        torch.manual_seed(number)
        set_gradients(adapted)
        (wrapper if kind == "wrapper" else optimizer).step()
    assert budget.step == 12
    assert count_nonzero(adapted) == sum(adapter.rank for adapter in adapted.plan) == 6


@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_sam_counts_a_step_once(compact: bool) -> None:
    adapted = make_adapted()
    optimizer = Sam(adapted.trainable_parameters())
    budget = ac.RankBudget(adapted, optimizer, make_schedule(compact=compact))
    for _ in range(12):
        set_gradients(adapted)
        optimizer.first_step()
        set_gradients(adapted)
        optimizer.second_step()
    assert (budget.step, count_nonzero(adapted)) == (12, 6)


def test_averages_follow() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, make_schedule())
    average = AveragedModel(adapted, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    late = copy.deepcopy(average)
    budget.follow(average)
    for number in range(12):
        step(adapted, optimizer, seed=number)
        average.update_parameters(adapted)
        late.update_parameters(adapted)
    assert count_nonzero(average.module) == 6  # type: ignore[arg-type]
    assert count_nonzero(late.module) > 6  # type: ignore[arg-type]
    budget.apply_mask(late)
    for site, lam in find_lambdas(late.module).items():  # type: ignore[arg-type]
        assert torch.equal(lam != 0, find_lambdas(adapted)[site] != 0)


def test_averages_shrink_with_the_model() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, make_schedule(compact=True))
    average, old = AveragedModel(adapted), AveragedModel(adapted)
    budget.follow(average)
    for number in range(12):
        step(adapted, optimizer, seed=number)
        if number < 7:
            old.update_parameters(adapted)
        average.update_parameters(adapted)
    budget.apply_mask(old)
    for one in (average, old):
        assert [adapter.rank for adapter in one.module.plan] == [adapter.rank for adapter in adapted.plan]  # type: ignore[union-attr]
        assert count_nonzero(one.module) == 6  # type: ignore[arg-type]
    state = budget.state_dict()
    fresh = make_adapted()
    resumed = ac.RankBudget(fresh, torch.optim.AdamW(fresh.trainable_parameters()), make_schedule(compact=True))
    before = AveragedModel(fresh)
    fresh.load_state_dict(adapted.state_dict())
    resumed.load_state_dict(state)
    resumed.apply_mask(before)
    assert [adapter.rank for adapter in before.module.plan] == [adapter.rank for adapter in adapted.plan]  # type: ignore[union-attr]


def test_what_is_no_copy_is_refused() -> None:
    adapted = make_adapted()
    budget = ac.RankBudget(adapted, torch.optim.SGD(adapted.trainable_parameters(), lr=1e-2), make_schedule())
    with pytest.raises(BudgetError, match="got a Linear without an adapted model in it, expected a copy"):
        budget.apply_mask(nn.Linear(2, 2))
    with pytest.raises(BudgetError, match=r"site 0\.weight: the copy has rank 3, expected rank 4"):
        budget.apply_mask(make_adapted(rank=3))


def test_second_weights_of_an_optimizer_are_masked() -> None:
    """As schedule-free's z: eval() mixes it into the weights."""
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-2)
    ac.RankBudget(adapted, optimizer, make_schedule())
    for number in range(12):
        for parameter in adapted.trainable_parameters():
            optimizer.state[parameter].setdefault("z", torch.ones_like(parameter))
        step(adapted, optimizer, seed=number)
    for parameter in split(adapted)[0]:
        assert torch.equal(optimizer.state[parameter]["z"] != 0, parameter != 0)


class AdamW8bit(torch.optim.AdamW):
    """Named as bitsandbytes names its own."""


def test_what_cannot_shrink_is_refused_when_the_budget_is_made() -> None:
    adapted = make_adapted()
    parameters = adapted.trainable_parameters()
    for optimizer in (torch.optim.LBFGS(parameters), AdamW8bit(parameters)):
        with pytest.raises(BudgetError, match=rf"compact=True\): {type(optimizer).__name__} keeps .* cannot be cut"):
            ac.RankBudget(adapted, optimizer, make_schedule(compact=True))
        ac.RankBudget(adapted, optimizer, make_schedule()).detach()


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "is an empty list, expected Optimizer"), (3, "is a int, expected Optimizer"), ([None], "is a NoneType")],
)
def test_what_is_no_optimizer_is_refused(given: Any, message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        ac.RankBudget(make_adapted(), given, make_schedule())


def test_a_compiled_model_is_unwrapped() -> None:
    adapted = make_adapted()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(torch.compile(adapted, backend="eager"), optimizer, make_schedule())
    step(adapted, optimizer, seed=0)
    assert budget.step == 1


def test_ranks_that_a_loaded_state_changes_are_followed(caplog: pytest.LogCaptureFixture) -> None:
    runs = []
    for compact in (True, False):
        adapted = make_adapted()
        optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
        runs.append((adapted, optimizer, ac.RankBudget(adapted, optimizer, make_schedule(compact=compact))))
    (source, other, _), (target, optimizer, budget) = runs
    for number in range(12):
        step(source, other, seed=number)
        step(target, optimizer, seed=number)
    target.load_state_dict(source.state_dict())
    assert budget.ranks() == {adapter.site.name: adapter.rank for adapter in source.plan}
    step(target, optimizer, seed=13)
    assert all(value.isfinite().all() for value in target.state_dict().values())
