"""On an accelerator no step waits for the device, and gradients with inf or nan are still found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import NonFiniteGradientError
from adapter_compiler.training.budget.stepping import finite_gradients
from tests.adapter_compiler.training.helpers import make_adapted, run, set_gradients, snapshot

STEPS = 40

#: Operators that wait for the device.
WAITING = ("aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::equal", "aten::item")


@pytest.fixture
def device_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat this host's memory as that of an accelerator."""
    monkeypatch.setattr(finite_gradients, "is_host", lambda device: False)


def make_budget(adapted: ac.AdaptedModel, semantics: str = "paper", **options: Any) -> ac.RankBudget:
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
    schedule = ac.BudgetSchedule(
        target_rank=2, total_steps=STEPS, warmup_steps=4, final_steps=10, semantics=semantics, **options
    )
    return ac.RankBudget(adapted, optimizer, schedule)


def step(adapted: ac.AdaptedModel, budget: ac.RankBudget) -> None:
    set_gradients(adapted)
    budget._chains[0][0].step()


def count_waits(adapted: ac.AdaptedModel, budget: ac.RankBudget) -> int:
    """How often one optimizer step would wait for a device."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        step(adapted, budget)
    return sum(event.count for event in profile.key_averages() if event.key in WAITING)


@pytest.mark.usefixtures("device_elsewhere")
@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_only_steps_that_mask_wait_for_the_device(semantics: str) -> None:
    adapted = make_adapted(gamma=0.1, dtype=torch.float32)
    budget = make_budget(adapted, semantics)
    waits = [count_waits(adapted, budget) for _ in range(STEPS)]
    masked = {record.step - budget.schedule.first_step for record in budget.history}
    assert masked
    assert {i for i, count in enumerate(waits) if count} == masked


def test_on_the_host_each_step_is_checked_before_it_changes_anything() -> None:
    adapted = make_adapted(gamma=0.1, dtype=torch.float32)
    assert count_waits(adapted, make_budget(adapted)) > 0


@pytest.mark.parametrize("semantics", ["paper", "peft"])
def test_steps_without_values(semantics: str) -> None:
    """Tensors on the meta device have no values, so that any question for one is an error."""
    model = nn.ModuleList([nn.Linear(6, 8, device="meta"), nn.Linear(8, 4, device="meta")])
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=4, gamma=0.1))
    budget = make_budget(adapted, semantics, interval=1000)
    for _ in range(3):
        step(adapted, budget)
    assert budget.step == 3
    with pytest.raises(RuntimeError, match="meta"):
        budget.state_dict()


@pytest.mark.usefixtures("device_elsewhere")
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_broken_gradient_is_found_at_the_next_masking(value: float) -> None:
    adapted = make_adapted(gamma=0.1, dtype=torch.float32)
    budget = make_budget(adapted, interval=5)
    for _ in range(6):
        step(adapted, budget)
    set_gradients(adapted)
    broken = adapted.adapters.get_parameter("1.weight.Q")
    assert broken.grad is not None
    broken.grad.view(-1)[1] = value
    ranks = budget.ranks()
    with pytest.raises(NonFiniteGradientError) as caught:
        for _ in range(10):
            budget._chains[0][0].step()
            set_gradients(adapted)
    assert "first: site 1.weight: the gradient of Q" in str(caught.value)
    assert "the first such gradient was that of step 7, and the optimizer has used it" in str(caught.value)
    assert budget.ranks() == ranks


@pytest.mark.usefixtures("device_elsewhere")
def test_a_broken_state_is_not_saved_and_a_long_wait_ends() -> None:
    for wait in (False, True):
        adapted = make_adapted(dtype=torch.float32)
        budget = make_budget(adapted, interval=1000)
        step(adapted, budget)
        set_gradients(adapted, float("nan"))
        budget._chains[0][0].step()
        with pytest.raises(NonFiniteGradientError, match="that of step 2"):
            if not wait:
                budget.state_dict()
            for _ in range(101):
                step(adapted, budget)


@pytest.mark.usefixtures("device_elsewhere")
def test_large_finite_gradients_are_no_error() -> None:
    adapted = make_adapted(dtype=torch.float32)
    budget = make_budget(adapted)
    budget._chains[0][0].param_groups[0]["lr"] = 0.0
    for parameter in adapted.trainable_parameters():
        parameter.grad = torch.full_like(parameter, 3e38)
    budget._chains[0][0].step()
    budget.state_dict()


def test_deferred_checks_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    states = []
    for elsewhere in (False, True):
        with monkeypatch.context() as patch:
            patch.setattr(finite_gradients, "is_host", lambda device, far=elsewhere: not far)
            torch.manual_seed(0)
            adapted = make_adapted(gamma=0.1, dtype=torch.float32)
            budget = make_budget(adapted)
            for _ in run(adapted, budget._chains[0][0], STEPS, seed=1):
                pass
            states.append(snapshot(adapted, budget._chains[0][0], budget))
    torch.testing.assert_close(states[1]["model"], states[0]["model"], rtol=0, atol=0)
    assert states[1]["budget"]["history"] == states[0]["budget"]["history"]


def test_gradients_stay_the_tensors_that_they_are() -> None:
    """A loop that keeps gradients as views of a buffer of its own, to reduce them at once, sees all that happens."""
    adapted = make_adapted(gamma=0.1, dtype=torch.float32)
    budget = make_budget(adapted)
    parameters = adapted.trainable_parameters()
    buffer = torch.randn(sum(p.numel() for p in parameters))
    views = [v.view_as(p) for v, p in zip(buffer.split([p.numel() for p in parameters]), parameters, strict=True)]
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view
    before = buffer.clone()
    budget._chains[0][0].step()
    assert all(parameter.grad is view for parameter, view in zip(parameters, views, strict=True))
    assert not torch.equal(buffer, before)  # by the regularizer


def test_accumulated_gradients_have_the_regularizer_once_a_step() -> None:
    """Without zero_grad, gradients add up in the same tensors."""
    adapted = make_adapted(gamma=0.1, dtype=torch.float32)
    budget = make_budget(adapted)
    optimizer = budget._chains[0][0]
    optimizer.param_groups[0]["lr"] = 0.0
    P = adapted.adapters.get_parameter("0.weight.P")
    added = 0.4 * P.detach() @ (P.detach().mT @ P.detach() - torch.eye(4))
    set_gradients(adapted)
    assert P.grad is not None
    expected = P.grad.clone()
    for _ in range(3):
        optimizer.step()
        expected = expected + added
        torch.testing.assert_close(P.grad, expected)
        for parameter in adapted.trainable_parameters():
            assert parameter.grad is not None
            parameter.grad.add_(1.0)
        expected = expected + 1.0
