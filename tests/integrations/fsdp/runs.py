"""A small model with blocks, its data by step and rank, and a run in one process to compare with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import adapter_compiler as ac
from adapter_compiler.integrations.fsdp import ShardedAdapters, shard

STEPS = 8

#: Computes the loss of a batch.
Loss = Callable[[nn.Module, torch.Tensor], torch.Tensor]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(32, 48), nn.Linear(48, 32), nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(self.drop(torch.tanh(self.up(x))))
        return result


def make(rank: int = 4, *, seed: int = 0, dropout: bool = False, **options: Any) -> ac.AdaptedModel:
    """An adapted model, always the same for a seed; 19 outputs are uneven over 2 and 4 ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(Block(), Block(), Block()), nn.Linear(32, 19))
    torch.manual_seed(1)
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=rank, **options))
    return adapted.train(dropout)


def draw(step: int, part: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, 16, generator=torch.Generator().manual_seed(100 * step + part))


def measure_loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    loss: torch.Tensor = model(x).square().mean()
    return loss


def make_optimizer(adapted: ac.AdaptedModel) -> torch.optim.Optimizer:
    return torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)


def make_budget(adapted: Any, optimizer: Any, *, compact: bool = False, target: float = 2) -> ac.RankBudget:
    schedule = ac.BudgetSchedule(
        target_rank=target, total_steps=STEPS, warmup_steps=1, final_steps=3, interval=1, compact=compact
    )
    return ac.RankBudget(adapted, optimizer, schedule)


@dataclasses.dataclass
class Run:
    """A model with what trains it."""

    adapted: ac.AdaptedModel
    optimizer: torch.optim.Optimizer
    budget: ac.RankBudget
    sharded: ShardedAdapters | None = None

    def train(self, steps: Iterable[int], parts: Iterable[int] | None = None) -> None:
        """Steps on the batches of these parts together; by default on that of this rank."""
        own = [dist.get_rank()] if parts is None else list(parts)
        for step in steps:
            measure_loss(self.adapted, torch.cat([draw(step, part) for part in own])).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()


def start(*, is_sharded: bool = True, compact: bool = True, options: Any = None, **make_options: Any) -> Run:
    """A run at its first step, on all ranks together or in this process alone."""
    adapted = make(**make_options)
    sharded = shard(adapted, **(options or {})) if is_sharded else None
    optimizer = make_optimizer(adapted)
    return Run(adapted, optimizer, make_budget(adapted, optimizer, compact=compact), sharded)


def run_alone(parts: int, steps: Iterable[int] = range(STEPS), **options: Any) -> Run:
    """The run of one process on the batches of all ranks."""
    run = start(is_sharded=False, **options)
    run.train(steps, range(parts))
    return run


def flatten(adapted: ac.AdaptedModel) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in adapted.adapters.parameters()])


def flatten_all(adapted: ac.AdaptedModel) -> torch.Tensor:
    """All adapters and trained values, whole."""
    adapters = [p for name in adapted.adapter_names for p in adapted.parameters_of_adapter(name).parameters()]
    found: list[Any] = [*adapters, *adapted.module.parameters(), *adapted.adapter_set.inactive.buffers()]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in found]
    return torch.cat([tensor.detach().flatten() for tensor in whole])


def assert_same_everywhere(value: torch.Tensor) -> None:
    everywhere = [torch.zeros_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, value.contiguous())
    assert all(torch.equal(one, value) for one in everywhere), "the ranks have drifted apart"


def assert_like(found: Run, expected: Run, *, atol: float = 1e-5) -> None:
    """The same ranks at each masking, and the same adapters up to the order of sums."""
    assert [record.ranks for record in found.budget.history] == [record.ranks for record in expected.budget.history]
    pairs = zip(found.adapted.adapters.named_parameters(), expected.adapted.adapters.parameters(), strict=True)
    for (name, value), wanted in pairs:
        torch.testing.assert_close({name: value}, {name: wanted}, rtol=0, atol=atol)


def share(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def list_folder(folder: str | Path) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())
