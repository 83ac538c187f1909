"""What a rank holds and sends under ``shard(adapted)``, measured on gloo ranks and counted for a large model.

    python benchmarks/sharding.py                     # 1, 2 and 4 ranks of this machine against one process
    python benchmarks/sharding.py --count llama-70b   # bytes per rank and step, from shapes alone

The first starts its own ranks. Each trains the same global batches with a rank budget, and prints the bytes of the base
that it holds, the memory of the process that sharding gave back, the bytes that one step gathers and reduces, and the
largest difference of an adapter from the run of one process. The second counts the same bytes for a model that no
machine here holds.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import adapter_compiler as ac
from adapter_compiler.integrations import shard

WIDTH, BLOCKS, ROWS, STEPS = 512, 4, 8, 6
MEGABYTE = 1e6


class Block(nn.Module):
    """A feed-forward block, as a transformer repeats it."""

    def __init__(self, width: int) -> None:
        """Make both layers."""
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to [..., width]."""
        result: torch.Tensor = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return result


def make() -> ac.AdaptedModel:
    """The same model with adapters in every process; the plain model is not kept."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Block(WIDTH) for _ in range(BLOCKS)])
    torch.manual_seed(1)
    return ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=8, inplace=True))


def draw(step: int, part: int, parts: int) -> torch.Tensor:
    """The batch of one rank; all parts together are the same for any number of ranks."""
    whole = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(step))
    return whole.chunk(parts)[part]


class CountTraffic(TorchDispatchMode):
    """Adds up the bytes that collectives of a process gather and reduce.

    Attributes:
        gathered: bytes of full parameters that all-gathers have put together.
        reduced: bytes of tensors that all-reduces have summed.
    """

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.gathered = self.reduced = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at the operator's name and run it."""
        name = str(func)
        if name.startswith("c10d._allgather_base_"):
            self.gathered += args[0].numel() * args[0].element_size()
        elif name.startswith("c10d.allreduce_"):
            self.reduced += sum(tensor.numel() * tensor.element_size() for tensor in args[0])
        return func(*args, **(kwargs or {}))


def read_memory() -> int:
    """Bytes of memory that are this process's own (Linux), or 0 where that cannot be read."""
    try:
        with open("/proc/self/smaps_rollup", encoding="ascii") as file:
            lines = dict(line.split(":", 1) for line in file if ":" in line)
    except OSError:
        return 0
    return 1024 * sum(int(lines[key].split()[0]) for key in ("Private_Clean", "Private_Dirty"))


def train(adapted: ac.AdaptedModel, parts: list[int], of: int) -> ac.RankBudget:
    """Train with a budget on these parts of each batch."""
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-3)
    schedule = ac.BudgetSchedule(target_rank=4, total_steps=STEPS, warmup_steps=1, final_steps=2, compact=True)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    for step in range(STEPS):
        x = torch.cat([draw(step, part, of) for part in parts])
        adapted(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return budget


def run_rank() -> None:
    """One rank: shard, count a step, train, and compare with one process; rank 0 prints."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    adapted = make()
    before = read_memory()
    sharded = shard(adapted)
    returned = before - read_memory()
    traffic = CountTraffic()
    with traffic:
        adapted(draw(0, rank, size)).square().mean().backward()
        sharded.sync_gradients()
    for parameter in adapted.adapters.parameters():
        parameter.grad = None
    budget = train(adapted, [rank], size)
    if rank == 0:
        alone = make()
        other = train(alone, list(range(size)), size)
        pairs = zip(adapted.adapters.parameters(), alone.adapters.parameters(), strict=True)
        difference = max(float((a - b).abs().max()) for a, b in pairs if a.numel())
        is_same = [record.ranks for record in budget.history] == [record.ranks for record in other.history]
        columns = (sharded.bytes_whole, sharded.bytes_here, returned, traffic.gathered, traffic.reduced)
        cells = [f"{value / MEGABYTE:.2f}" for value in columns]
        print(
            f"| {size} | {' | '.join(cells)} | {difference:.1e} | {'the same' if is_same else 'OTHERS'} |", flush=True
        )
    dist.barrier()
    dist.destroy_process_group()


def measure(ranks: list[int]) -> None:
    """Start the ranks and print a table."""
    print("All columns in MB but the last two.\n")
    print("| ranks | base | on a rank | freed by shard | gathered | reduced | difference | masks |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for size in ranks:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(size)]
        subprocess.run([*command, __file__, "--rank"], check=True, env=environment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """A decoder by its sizes."""

    hidden: int
    layers: int
    intermediate: int
    key_values: int
    vocabulary: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """[out, in] of each weight of a block: q, k, v, o, gate, up, down."""
        h, i, kv = self.hidden, self.intermediate, self.key_values
        return [(h, h), (kv, h), (kv, h), (h, h), (i, h), (i, h), (h, i)]


SHAPES = {
    "llama-8b": Shape(hidden=4096, layers=32, intermediate=14336, key_values=1024, vocabulary=128256),
    "llama-70b": Shape(hidden=8192, layers=80, intermediate=28672, key_values=1024, vocabulary=128256),
}


def count(name: str, rank: int) -> None:
    """Print the bytes per rank and step for a model in bfloat16 with adapters in float32 at every matrix."""
    shape = SHAPES[name]
    block = sum(out * inside for out, inside in shape.matrices)
    rest = 2 * shape.vocabulary * shape.hidden
    base = shape.layers * block + rest
    adapters = shape.layers * sum((out + inside + 1) * rank for out, inside in shape.matrices)
    print(f"{name}: {base / 1e9:.1f} billion parameters, {adapters / 1e6:.0f} million in adapters of rank {rank}\n")
    print("| ranks | base on a rank | adapters, gradients, AdamW | scores | received by gathers | all-reduced |")
    print("|---|---|---|---|---|---|")
    for ranks in (1, 8, 16, 64):
        share = (ranks - 1) / ranks
        gathered = share * 2 * (2 * shape.layers * block + rest)  # blocks in forward and backward, the rest once
        cells = [2 * base / ranks, 16 * adapters, 8 * adapters, gathered, 2 * share * 4 * adapters]
        print(f"| {ranks} | {' | '.join(f'{value / 1e9:.2f} GB' for value in cells)} |")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--count", choices=SHAPES, help="count for this model instead of measuring")
    parser.add_argument("--adapter-rank", type=int, default=8, help="the rank that --count takes")
    options = parser.parse_args()
    if options.rank:
        run_rank()
    elif options.count:
        count(options.count, options.adapter_rank)
    else:
        measure(options.ranks)


if __name__ == "__main__":
    main()
