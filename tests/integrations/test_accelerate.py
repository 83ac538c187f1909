"""Accelerate around the model, the optimizer and the budget."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_compiler as ac
from tests.integrations.models import Rows, make_adapted, values_of

accelerate = pytest.importorskip("accelerate", reason="the extra 'integrations' is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")


class Run:
    def __init__(self, *, compact: bool, **options: Any) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        self.accelerator = accelerate.Accelerator(cpu=True, **options)
        self.adapted = make_adapted()
        optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=1e-2)
        self.model, self.optimizer = self.accelerator.prepare(self.adapted, optimizer)
        schedule = ac.BudgetSchedule(
            target_rank=2, total_steps=12, warmup_steps=1, final_steps=4, interval=2, compact=compact
        )
        self.budget = ac.RankBudget(self.model, self.optimizer, schedule)
        self.accelerator.register_for_checkpointing(self.budget)

    def train(self, first: int, end: int) -> None:
        for step in range(first, end):
            row = [Rows()[4 * step + i] for i in range(4)]
            x, labels = torch.stack([r["x"] for r in row]), torch.tensor([r["labels"] for r in row])
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(self.model(x, labels=labels)["loss"])
                self.optimizer.step()
                self.optimizer.zero_grad()


@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
@pytest.mark.parametrize("stop", [3, 9], ids=["before the freeze", "after it"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int, compact: bool) -> None:
    whole = Run(compact=compact)
    whole.train(0, stop)
    whole.accelerator.save_state(str(tmp_path))
    whole.train(stop, 12)
    resumed = Run(compact=compact)
    resumed.accelerator.load_state(str(tmp_path))
    resumed.train(stop, 12)
    for name, value in values_of(whole.adapted).items():
        torch.testing.assert_close(values_of(resumed.adapted)[name], value, rtol=0, atol=0, msg=name)
    assert resumed.budget.history == whole.budget.history
    assert (resumed.budget.step, resumed.budget.live_triplets) == (12, 4)


@pytest.mark.parametrize("order", ["model first", "optimizer first", "one by one", "budget before prepare"])
def test_prepare_works_in_any_order(order: str) -> None:
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = accelerate.Accelerator(cpu=True)
    adapted: Any = make_adapted()
    optimizer: Any = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    schedule = ac.BudgetSchedule(target_rank=2, total_steps=6, warmup_steps=1, final_steps=2, interval=1)
    budget = ac.RankBudget(adapted, optimizer, schedule) if order == "budget before prepare" else None
    model: Any = adapted
    if order == "optimizer first":
        optimizer, model = accelerator.prepare(optimizer, model)
    elif order == "one by one":
        model = accelerator.prepare(model)
        optimizer = accelerator.prepare(optimizer)
    else:
        model, optimizer = accelerator.prepare(model, optimizer)
    budget = budget or ac.RankBudget(model, optimizer, schedule)
    for _ in range(6):
        accelerator.backward(model(torch.randn(4, 6), labels=torch.arange(4))["loss"])
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert (budget.step, budget.live_triplets) == (6, 4)
    assert sum(int(p.count_nonzero()) for n, p in adapted.adapters.named_parameters() if n.endswith("lam")) == 4


def test_accumulated_steps_are_one() -> None:
    run = Run(compact=False, gradient_accumulation_steps=2)
    run.train(0, 6)
    assert run.budget.step == 3


def test_a_wrapped_forward_keeps_its_signature() -> None:
    run = Run(compact=False, mixed_precision="bf16")
    run.train(0, 2)
    assert run.budget.step == 2
    assert run.accelerator.unwrap_model(run.model) is run.adapted
