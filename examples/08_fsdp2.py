"""Shard the base of a model over several ranks by FSDP2, and train, resume, fold and export its adapters.

    python examples/08_fsdp2.py                                  # starts two ranks itself
    torchrun --nproc-per-node 2 examples/08_fsdp2.py             # the same; any number of ranks, on GPUs with NCCL

A network of blocks that reads scikit-learn's digits is adapted to rotated ones. Each rank holds its part of the base,
and gathers a block at a time while it computes; adapters are small and whole on every rank. In the middle of the
pruning, all ranks save their state together, and new objects resume it bit for bit. At the end, rank 0 gets the merged
model, exports it, and compares the ranks that were pruned with those of a run in one process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.integrations import ShardedAdapters, shard

STEPS, STOP, BATCH = 60, 25, 64
#: Only rank 0 prints.
console = Console(quiet=os.environ.get("RANK", "0") != "0")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(F.gelu(self.up(x)))
        return result


def make_base(x: Tensor, y: Tensor) -> nn.Module:
    """A trained network, the same on every rank since each draws the same numbers."""
    torch.manual_seed(0)
    base = nn.Sequential(*[Block() for _ in range(4)], nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(60):
        rows = torch.randint(len(x), (BATCH,))
        F.cross_entropy(base(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return base


class Run:
    """A model with what trains it, at its first step; of its batches, this process takes its share."""

    def __init__(self, x: Tensor, y: Tensor, device: torch.device, *, is_sharded: bool) -> None:
        base = make_base(x, y)
        torch.manual_seed(1)
        # In place: no second reference keeps the full weights alive when they are sharded.
        self.adapted = ac.compile_with_adapters(base, config=ac.AdapterConfig(rank=8, inplace=True)).to(device)
        self.sharded: ShardedAdapters | None = shard(self.adapted) if is_sharded else None
        self.share = (dist.get_rank(), dist.get_world_size()) if is_sharded else (0, 1)
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=1e-2)
        schedule = ac.BudgetSchedule(target_rank=3, total_steps=STEPS, interval=5, compact=True)
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule)

    def train(self, x: Tensor, y: Tensor, *, until: int) -> None:
        while self.budget.step < until:
            rows = torch.randint(len(x), (BATCH,), generator=torch.Generator().manual_seed(self.budget.step))
            rank, ranks = self.share
            mine = rows[rank::ranks]
            F.cross_entropy(self.adapted(x[mine]), y[mine]).backward()
            self.optimizer.step()  # averages the adapters' gradients over the ranks first
            self.optimizer.zero_grad()


def train_on_this_rank(folder: Path, device: torch.device) -> None:
    digits = load_digits()
    plain, y = (
        torch.tensor(digits.data, dtype=torch.float32, device=device) / 16,
        torch.tensor(digits.target).to(device),
    )
    x = plain.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)

    run = Run(plain.cpu(), y.cpu(), device, is_sharded=True)
    sharded = run.sharded
    assert sharded is not None
    console.print(f"base: {sharded.bytes_here:,} of {sharded.bytes_whole:,} bytes on rank 0 of {dist.get_world_size()}")
    run.train(x, y, until=STOP)
    sharded.save_training_state(folder, run.optimizer, run.budget)
    run.train(x, y, until=STEPS)

    resumed = Run(plain.cpu(), y.cpu(), device, is_sharded=True)
    assert resumed.sharded is not None
    resumed.sharded.load_training_state(folder, resumed.optimizer, resumed.budget)
    resumed.train(x, y, until=STEPS)
    pairs = zip(run.adapted.adapters.parameters(), resumed.adapted.adapters.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs), "the resumed run differs"
    console.print(f"stopped at step {STOP}, resumed, equal in every bit at step {STEPS}")

    sharded.save(folder / "adapters")
    sharded.export_onnx(folder / "digits.onnx", (x[:4].cpu(),))
    merged = sharded.fold()  # your own model on rank 0, None elsewhere
    if merged is None:
        return
    alone = Run(plain.cpu(), y.cpu(), torch.device("cpu"), is_sharded=False)
    alone.train(x.cpu(), y.cpu(), until=STEPS)
    assert [record.ranks for record in run.budget.history] == [record.ranks for record in alone.budget.history]
    accuracy = (merged(x.cpu()).argmax(1) == y.cpu()).float().mean()
    assert accuracy > 0.8
    console.print(f"the same {run.budget.live_triplets} triplets as in one process; accuracy {accuracy:.1%}")


def main() -> None:
    if "RANK" not in os.environ:
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
        sys.exit(subprocess.run([sys.executable, *ranks], check=False).returncode)
    with_cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if with_cuda else torch.device("cpu")
    if with_cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    dist.init_process_group("nccl" if with_cuda else "gloo")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        dist.broadcast_object_list(folder)  # one folder that every rank sees
        train_on_this_rank(Path(folder[0]), device)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
