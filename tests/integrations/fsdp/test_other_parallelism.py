"""Other kinds of parallelism either compute what one process does, or say that they do not."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, SiteError
from tests.integrations.fsdp.runs import Block, draw, make, measure_loss
from tests.ranks import run_ranks

TENSOR_PARALLEL: Any = {"1.0.up": ColwiseParallel(), "1.0.down": RowwiseParallel()}


def use_tensor_parallelism() -> None:
    mesh = init_device_mesh("cpu", (2,))
    x = draw(0, 0)
    # Of weights without adapters: right.
    adapted = make(exclude=("1.0.*",))
    measure_loss(adapted, x).backward()
    expected, wanted = adapted(x), [p.grad for p in adapted.adapters.parameters()]
    adapted.zero_grad()
    parallelize_module(adapted.module, mesh, TENSOR_PARALLEL)
    torch.testing.assert_close(adapted(x), expected)
    measure_loss(adapted, x).backward()
    torch.testing.assert_close([p.grad for p in adapted.adapters.parameters()], wanted)
    # Of weights with adapters: refused at the call, or when compiling.
    adapted = make()
    parallelize_module(adapted.module, mesh, TENSOR_PARALLEL)
    with pytest.raises(SiteError, match=r"1\.0\.up\.weight is a DTensor .* cannot be tensor parallel"):
        adapted(x)
    model = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 8))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    with pytest.raises(ConfigError, match=r"0\.weight is a DTensor over 2 ranks"):
        ac.compile_with_adapters(model)


def test_tensor_parallel_weights_have_no_adapters() -> None:
    run_ranks(2, use_tensor_parallelism)


def use_fsdp1() -> None:
    adapted = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says that it is deprecated
        wrapped = FullyShardedDataParallel(adapted, device_id=torch.device("cpu"), use_orig_params=True)
    with pytest.raises(SiteError, match=r"use shard\(adapted\) in place of FullyShardedDataParallel"):
        wrapped(draw(0, 0))


def test_the_first_fsdp_is_refused_at_the_first_call() -> None:
    run_ranks(2, use_fsdp1)


def make_stages() -> list[ac.AdaptedModel]:
    torch.manual_seed(0)
    parts = [nn.Sequential(nn.Linear(16, 32), Block()), nn.Sequential(Block(), nn.Linear(32, 19))]
    return [ac.compile_with_adapters(part.eval(), config=ac.AdapterConfig(rank=4)) for part in parts]


def use_pipeline() -> None:
    """Each stage is a model with adapters and a budget of its own."""
    rank = dist.get_rank()
    stages, alone = make_stages(), make_stages()
    for one, other in zip(alone, stages, strict=True):
        one.load_state_dict(other.state_dict())
    mine = stages[rank]
    schedule = ScheduleGPipe(
        PipelineStage(mine, rank, 2, torch.device("cpu")),
        n_microbatches=2,
        loss_fn=lambda output, target: (output - target).square().mean(),
    )
    x = torch.cat([draw(0, 0), draw(0, 1)])
    optimizers = [torch.optim.AdamW(part.trainable_parameters(), lr=1e-2) for part in (mine, *alone)]
    options: Any = {"target_rank": 2, "total_steps": 4, "warmup_steps": 1, "final_steps": 1, "interval": 1}
    budgets = [
        ac.RankBudget(part, optimizer, ac.BudgetSchedule(**options))
        for part, optimizer in zip((mine, *alone), optimizers, strict=True)
    ]
    for _ in range(4):
        schedule.step(x) if rank == 0 else schedule.step(target=torch.zeros(8, 19))
        for half in x.split(4):
            (alone[1](alone[0](half)).square().mean() / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert budgets[0].history == budgets[1 + rank].history
    pairs = zip(mine.adapters.parameters(), alone[rank].adapters.parameters(), strict=True)
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_stages_of_a_pipeline_are_adapted_one_by_one() -> None:
    run_ranks(2, use_pipeline)


def test_data_parallel_copies_are_refused() -> None:
    """``nn.DataParallel`` calls this on each module before it copies them to several devices."""
    adapted = make()
    for module in (adapted, adapted.module.get_submodule("0")):
        with pytest.raises(ConfigError, match="use DistributedDataParallel"):
            module._replicate_for_data_parallel()
