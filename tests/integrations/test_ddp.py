"""DistributedDataParallel trains what one process does, with each of its options, and compacted between phases."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.fsdp.runs import (
    STEPS,
    Run,
    assert_like,
    assert_same_everywhere,
    draw,
    flatten,
    make,
    make_budget,
    make_optimizer,
    measure_loss,
)
from tests.ranks import run_ranks


def train(parts: list[int], *, wrap: dict[str, Any] | None, batches: int, compact_at: int | None) -> Run:
    """Steps over several batches each; with DDP around the model if it gets options for it."""
    adapted = make()
    model: Any = adapted if wrap is None else DistributedDataParallel(adapted, **wrap)
    optimizer = make_optimizer(adapted)
    budget = make_budget(model, optimizer, target=0.5)
    for step in range(STEPS + 4):
        if step == compact_at:
            del model
            budget.compact()
            model = adapted if wrap is None else DistributedDataParallel(adapted, **wrap)
        for number in range(batches):
            x = torch.cat([draw(batches * step + number, part) for part in parts])
            if wrap is not None and number < batches - 1:
                with model.no_sync():
                    measure_loss(model, x).backward()
            else:
                measure_loss(model, x).backward()
        nn.utils.clip_grad_norm_(adapted.trainable_parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert 0 in budget.ranks().values()
    return Run(adapted, optimizer, budget)


def compare(options: dict[str, Any], batches: int, compact_at: int | None) -> None:
    logging.disable(logging.WARNING)  # of the steps after the last of the schedule
    found = train([dist.get_rank()], wrap=options, batches=batches, compact_at=compact_at)
    parts = list(range(dist.get_world_size()))
    assert_like(found, train(parts, wrap=None, batches=batches, compact_at=compact_at))
    assert_same_everywhere(flatten(found.adapted))


def compare_all(cases: list[tuple[dict[str, Any], int, int | None]]) -> None:
    for case in cases:
        compare(*case)


CASES: list[tuple[dict[str, Any], int, int | None]] = [
    ({"static_graph": True}, 1, None),
    ({"gradient_as_bucket_view": True}, 1, STEPS),
    ({"find_unused_parameters": True}, 1, STEPS),
    ({}, 2, None),
    ({"static_graph": True, "gradient_as_bucket_view": True}, 1, STEPS),
]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_train_as_one_process(ranks: int) -> None:
    """With a graph that does not change, gradients in buckets, unused parameters, accumulation, and a second wrap."""
    run_ranks(ranks, compare_all, CASES)
