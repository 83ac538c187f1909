"""The two trainings: all weights on the first task, then only adapters on the changed task."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import nn

import adapter_compiler as ac
from adapter_compiler.cli.demo.data import LabeledImages
from adapter_compiler.cli.demo.model import DigitTransformer
from adapter_compiler.cli.demo.options import DemoOptions

BATCH_SIZE = 64

_PRETRAINING_RATE = 2e-3
_ADAPTER_RATE = 6e-3
_SCALE = 4.0

#: Called after each optimizer step with the loss, and with the number of live triplets or ``None`` without a budget.
Watcher = Callable[[float, int | None], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adaptation:
    """The result of training adapters.

    Attributes:
        model: the model with its trained adapters.
        budget: the rank budget of the training.
        initial_triplets: the number of triplets at the start.
        losses: the loss of each step.
    """

    model: ac.AdaptedModel
    budget: ac.RankBudget
    initial_triplets: int
    losses: tuple[float, ...]


def pretrain(digits: LabeledImages, options: DemoOptions, watch: Watcher) -> DigitTransformer:
    """Train all weights of a new model on ``digits``; returns the model in eval mode."""
    torch.manual_seed(options.seed)
    model = DigitTransformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_PRETRAINING_RATE, weight_decay=0.05)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _PRETRAINING_RATE, total_steps=options.pretraining_steps)
    for images, labels in _draw_batches(digits, options.pretraining_steps):
        loss = _take_step(model, optimizer, images, labels)
        rate.step()
        watch(loss, None)
    return model.eval()


def adapt(model: nn.Module, digits: LabeledImages, options: DemoOptions, watch: Watcher) -> Adaptation:
    """Run AdaLoRA: train and prune adapters on ``digits``; the weights of the model do not change."""
    torch.manual_seed(options.seed)
    adapted = ac.compile_with_adapters(
        model.train(),
        (digits.images[:BATCH_SIZE],),
        config=ac.AdapterConfig(rank=options.rank, alpha=_SCALE * options.rank),
    )
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=_ADAPTER_RATE, weight_decay=0.0)
    schedule = ac.BudgetSchedule(target_rank=options.target_rank, total_steps=options.steps)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    initial = budget.live_triplets
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _ADAPTER_RATE, total_steps=options.steps, pct_start=0.1)
    losses = []
    for images, labels in _draw_batches(digits, options.steps):
        losses.append(_take_step(adapted, optimizer, images, labels))
        rate.step()
        watch(losses[-1], budget.live_triplets)
    return Adaptation(model=adapted.eval(), budget=budget, initial_triplets=initial, losses=tuple(losses))


def _take_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor, labels: torch.Tensor) -> float:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    return loss.item()


def _draw_batches(digits: LabeledImages, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for _ in range(steps):
        rows = torch.randint(len(digits), (BATCH_SIZE,))
        yield digits.images[rows], digits.labels[rows]
