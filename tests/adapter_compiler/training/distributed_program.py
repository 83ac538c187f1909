"""Run by torchrun: two processes train, prune and save what one process does; the first argument says how."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError
from adapter_compiler.integrations.fsdp import ShardedAdapters, shard

STEPS = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.down(torch.tanh(self.up(x)))
        return result


def make() -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(*[Block() for _ in range(3)]), nn.Linear(32, 8))
    torch.manual_seed(1)
    return ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=4))


def draw(step: int, part: int) -> torch.Tensor:
    return torch.randn(4, 16, generator=torch.Generator().manual_seed(100 * step + part))


def make_budget(adapted: Any, optimizer: Any, *, compact: bool = False) -> ac.RankBudget:
    schedule = ac.BudgetSchedule(
        target_rank=2, total_steps=STEPS, warmup_steps=1, final_steps=4, interval=2, compact=compact
    )
    return ac.RankBudget(adapted, optimizer, schedule)


def train(
    called: nn.Module,
    optimizer: torch.optim.Optimizer,
    steps: range,
    *,
    one: bool,
    sharded: ShardedAdapters | None = None,
) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in steps:
        parts = range(dist.get_world_size()) if one else [dist.get_rank()]
        x = torch.cat([draw(step, part) for part in parts])
        called(x).square().mean().backward()
        if sharded is not None:
            sharded.sync_gradients()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()


def run_one(*, compact: bool) -> tuple[ac.AdaptedModel, ac.RankBudget]:
    adapted = make()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = make_budget(adapted, optimizer, compact=compact)
    train(adapted, optimizer, range(STEPS), one=True)
    return adapted, budget


def assert_same_run(
    found: ac.AdaptedModel, budget: ac.RankBudget, expected: ac.AdaptedModel, other: ac.RankBudget
) -> None:
    assert [record.ranks for record in budget.history] == [record.ranks for record in other.history]
    assert budget.ranks() == other.ranks()
    for (name, value), wanted in zip(found.adapters.named_parameters(), expected.adapters.parameters(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=1e-5, msg=name)
    mine = torch.cat([p.detach().flatten() for p in found.adapters.parameters()])
    everywhere = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, mine)
    assert all(torch.equal(one, mine) for one in everywhere), "the ranks have drifted apart"


def ddp() -> None:
    expected, other = run_one(compact=False)
    adapted = make()
    wrapped = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = make_budget(wrapped, optimizer)
    train(wrapped, optimizer, range(STEPS), one=False)
    assert_same_run(adapted, budget, expected, other)


def ddp_rewrapped() -> None:
    """Compacted by hand, with a site that is empty from then on, and wrapped anew; at the end, uneven inputs."""
    adapted = make()
    wrapped = DistributedDataParallel(adapted)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = make_budget(wrapped, optimizer)
    train(wrapped, optimizer, range(8), one=False)
    with torch.no_grad():
        adapted.adapters.get_parameter("0.weight.lam").zero_()
    kept = {adapter.site.name: torch.arange(2) for adapter in adapted.plan}
    budget.shrink({**kept, "0.weight": torch.tensor([], dtype=torch.long)})
    del wrapped
    wrapped = DistributedDataParallel(adapted)
    train(wrapped, optimizer, range(8, STEPS), one=False)
    assert adapted.plan.adapters[0].rank == 0
    with wrapped.join():
        for step in range(2 + dist.get_rank()):
            wrapped(draw(step, 0)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def ddp_refused() -> None:
    adapted = make()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    early = make_budget(adapted, optimizer, compact=True)
    early.detach()
    wrapped = DistributedDataParallel(adapted)
    for given in (wrapped, adapted):
        try:
            make_budget(given, optimizer, compact=True)
        except BudgetError as error:
            assert "DistributedDataParallel holds the model" in str(error)
        else:
            raise AssertionError("compact=True was not refused")


def fsdp(*, compact: bool = False) -> None:
    expected, other = run_one(compact=compact)
    adapted = make()
    sharded = shard(adapted)
    world = dist.get_world_size()
    assert sharded.bytes_here <= sharded.bytes_whole / world + 64 * len(list(adapted.module.parameters()))
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = make_budget(adapted, optimizer, compact=compact)
    train(adapted, optimizer, range(STEPS), sharded=sharded, one=False)
    assert_same_run(adapted, budget, expected, other)
    assert budget.live_triplets == 2 * len(adapted.plan)
    folder = Path(share(tempfile.mkdtemp() if dist.get_rank() == 0 else None))
    assert (sharded.save(folder) is None) == (dist.get_rank() > 0)
    again = make()
    ac.load_adapters(again, folder)
    x = draw(99, 0)
    merged, everywhere = sharded.fold(), sharded.fold(gather="all")
    assert (merged is None) == (dist.get_rank() > 0)
    assert everywhere is not None
    torch.testing.assert_close(everywhere(x), again(x), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted(x), again(x), rtol=1e-4, atol=1e-5)
    assert all(type(p) is nn.Parameter and p.requires_grad for p in everywhere.parameters())
    sharded.detach()


def fsdp_resumed() -> None:
    """What trains is whole on each rank, so one file is enough, whatever the number of ranks."""
    runs = []
    folder = Path(share(tempfile.mkdtemp() if dist.get_rank() == 0 else None))
    for stop in (None, 6, 10):
        adapted = make()
        sharded = shard(adapted)
        optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
        budget = make_budget(adapted, optimizer, compact=True)
        if stop is not None:
            ac.load_training_state(folder / str(stop), adapted, optimizer, budget)
        for step in range(stop or 0, STEPS):
            if stop is None and step in (6, 10):
                if dist.get_rank() == 0:
                    ac.save_training_state(folder / str(step), adapted, optimizer, budget)
                dist.barrier()
            train(adapted, optimizer, range(step, step + 1), sharded=sharded, one=False)
        sharded.detach()
        runs.append((adapted, budget))
    for adapted, budget in runs[1:]:
        assert budget.history == runs[0][1].history
        for found, expected in zip(adapted.adapters.parameters(), runs[0][0].adapters.parameters(), strict=True):
            assert torch.equal(found, expected)


def fsdp_by_itself() -> None:
    """Gradients are averaged before the step where nobody has asked for it, also those that only some ranks have."""
    adapted = make()
    sharded = shard(adapted)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1.0)
    before = [p.detach().clone() for p in adapted.adapters.parameters()]
    for position, parameter in enumerate(adapted.adapters.parameters()):
        if position % 2 or dist.get_rank() == 0:
            parameter.grad = torch.full_like(parameter, float(dist.get_rank()) + 1)
    optimizer.step()
    world = dist.get_world_size()
    for position, (old, new) in enumerate(zip(before, adapted.adapters.parameters(), strict=True)):
        mean = (world + 1) / 2 if position % 2 else 1 / world
        torch.testing.assert_close(new, old - mean)
    sharded.detach()


def share(value: Any) -> Any:
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


KINDS = {
    "ddp": ddp,
    "ddp, wrapped anew": ddp_rewrapped,
    "ddp, compact": ddp_refused,
    "fsdp": fsdp,
    "fsdp, compact": lambda: fsdp(compact=True),
    "fsdp, by itself": fsdp_by_itself,
    "fsdp, resumed": fsdp_resumed,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(dist.destroy_process_group)
        for kind in sys.argv[1:]:
            KINDS[kind]()
            sys.stdout.write(f"{kind}: same\n" if dist.get_rank() == 0 else "")
            sys.stdout.flush()
