"""Two processes train the same adapters as one: under DistributedDataParallel, and over a base that FSDP2 shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("distributed_program.py")
DDP = ("ddp", "ddp, wrapped anew", "ddp, compact")
FSDP = ("fsdp", "fsdp, compact", "fsdp, by itself", "fsdp, resumed")


def run(kinds: tuple[str, ...], processes: int) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(PROGRAM), *kinds], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line] == [f"{kind}: same" for kind in kinds]


@pytest.mark.parametrize("kinds", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_two_processes_train_what_one_does(kinds: tuple[str, ...]) -> None:
    run(kinds, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kinds", [DDP, FSDP], ids=["ddp", "fsdp"])
def test_four_processes_train_what_one_does(kinds: tuple[str, ...]) -> None:
    run(kinds, 4)
