"""Training on a CUDA device: the same numbers as on the CPU, and no step that waits for the device."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import NonFiniteGradientError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]

STEPS = 30


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 4))


def make_run(device: str, dtype: torch.dtype = torch.float32) -> tuple[ac.AdaptedModel, ac.RankBudget, torch.Tensor]:
    torch.manual_seed(1)
    x = torch.randn(64, 16)
    adapted = ac.compile_with_adapters(
        make_model().to(dtype), (x.to(dtype),), config=ac.AdapterConfig(rank=4, gamma=0.1)
    )
    adapted.to(device)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2, fused=True)
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=STEPS, warmup_steps=3, final_steps=8, interval=5)
    return adapted, ac.RankBudget(adapted, optimizer, schedule), x.to(device, dtype)


def train(adapted: ac.AdaptedModel, budget: ac.RankBudget, x: torch.Tensor) -> Iterator[int]:
    optimizer = budget._chains[0][0]
    for step in range(STEPS):
        adapted(x).float().square().mean().backward()
        yield step
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def _waiting_is_an_error() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_waiting_is_an_error")
def test_no_step_waits_for_the_device_unless_it_masks() -> None:
    adapted, budget, x = make_run("cuda")
    for step in train(adapted, budget, x):
        number = step + budget.schedule.first_step
        torch.cuda.set_sync_debug_mode("default" if budget.schedule.is_masking_step(number) else "error")
    torch.cuda.set_sync_debug_mode("default")
    assert budget.live_triplets == 2 * len(adapted.sites)


def test_masks_and_losses_are_those_of_the_cpu() -> None:
    found = []
    for device in ("cpu", "cuda"):
        adapted, budget, x = make_run(device)
        for _ in train(adapted, budget, x):
            pass
        found.append((budget.ranks(), [record.ranks for record in budget.history], adapted(x).detach().cpu()))
    assert found[0][:2] == found[1][:2]
    torch.testing.assert_close(found[1][2], found[0][2], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_and_folded_calls_are_the_eager_ones(dtype: torch.dtype) -> None:
    adapted, budget, x = make_run("cuda", dtype)
    for _ in train(adapted, budget, x):
        pass
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    expected = adapted(x).detach()
    torch.testing.assert_close(adapted.fold()(x).detach(), expected, rtol=tolerance, atol=tolerance)
    compiled = copy.deepcopy(adapted)
    compiled.compile()
    torch.testing.assert_close(compiled(x).detach(), expected, rtol=tolerance, atol=tolerance)


def test_a_broken_gradient_is_reported() -> None:
    adapted, budget, x = make_run("cuda")
    steps = train(adapted, budget, x)
    next(steps)
    for parameter in adapted.trainable_parameters():
        parameter.grad = torch.full_like(parameter, float("nan"))
    next(steps)
    with pytest.raises(NonFiniteGradientError, match="on cuda are checked without waiting"):
        budget.state_dict()
