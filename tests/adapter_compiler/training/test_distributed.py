"""Two processes train the same adapters as one: under DistributedDataParallel, and over a base that FSDP2 shards."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import sys
import warnings

import torch
import torch.distributed as dist
from torch import nn

import adapter_compiler as ac
from adapter_compiler.model.dispatch.scope import base_weights

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo")
rank, kind = dist.get_rank(), sys.argv[1]


def make():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Sequential(nn.Linear(32, 32), nn.GELU()), nn.Linear(32, 8))
    torch.manual_seed(1)
    return ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=4))


def draw(step, part):
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(100 * step + part))


def shard(adapted):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    options = {"mesh": init_device_mesh("cpu", (2,)), "ignored_params": set(adapted.adapters.parameters())}
    with base_weights():  # FSDP reads the parameters by their attributes
        fully_shard(adapted.module[2], **options)
        fully_shard(adapted.module, **options)
        adapted.module._get_fsdp_state()._lazy_init()
    return adapted


def train(kind):
    adapted = make()
    wrapped = adapted
    if kind == "ddp":
        wrapped = nn.parallel.DistributedDataParallel(adapted)
    elif kind == "fsdp":
        wrapped = shard(adapted)
    parameters = adapted.trainable_parameters()
    optimizer = torch.optim.AdamW(parameters, lr=1e-2)
    for step in range(10):
        x = torch.cat([draw(step, 0), draw(step, 1)]) if kind == "one" else draw(step, rank)
        wrapped(x).square().mean().backward()
        if kind == "fsdp":
            for parameter in parameters:
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
        optimizer.step()
        optimizer.zero_grad()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


expected, found = train("one"), train(kind)
assert float(expected.abs().max()) > 0.1
torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
print("same" if rank == 0 else "")
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_train_what_one_does(kind: str, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(program), kind], capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "same" in done.stdout
