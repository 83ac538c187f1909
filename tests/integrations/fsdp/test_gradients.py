"""Adapters that are whole on every rank train as in one process, however the user's loop is written."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import adapter_compiler as ac
from adapter_compiler.integrations import shard
from tests.integrations.fsdp.runs import (
    STEPS,
    assert_like,
    assert_same_everywhere,
    draw,
    flatten,
    flatten_all,
    make,
    make_budget,
    make_optimizer,
    measure_loss,
    run_alone,
    start,
)
from tests.ranks import run_ranks


def read_gradients(adapted: ac.AdaptedModel) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in adapted.adapters.parameters() if p.grad is not None])


def expect_gradients(parts: list[tuple[int, int]], weight: float = 1.0) -> torch.Tensor:
    """Those of one process on several batches, by step and part, each with its own backward."""
    adapted = make()
    for step, part in parts:
        (weight * measure_loss(adapted, draw(step, part))).backward()
    return read_gradients(adapted)


def is_average_alike() -> None:
    """A request, more of them, and a backward after one, which only one rank runs with a loss that counts."""
    adapted = make()
    sharded = shard(adapted)
    rank = dist.get_rank()
    measure_loss(adapted, draw(0, rank)).backward()
    sharded.sync_gradients()
    torch.testing.assert_close(read_gradients(adapted), expect_gradients([(0, 0), (0, 1)], 0.5))
    sharded.sync_gradients()
    torch.testing.assert_close(read_gradients(adapted), expect_gradients([(0, 0), (0, 1)], 0.5))
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.0)
    measure_loss(adapted, draw(1, rank)).backward()
    optimizer.step()
    expected = expect_gradients([(0, 0), (0, 1), (1, 0), (1, 1)], 0.5)
    torch.testing.assert_close(read_gradients(adapted), expected)
    optimizer.zero_grad()
    # The rank that has no batch runs the model all the same, since the others gather weights with it.
    loss = measure_loss(adapted, draw(2, 0)) if rank == 0 else adapted(draw(2, 0)).sum() * 0
    loss.backward()
    optimizer.step()
    torch.testing.assert_close(read_gradients(adapted), expect_gradients([(2, 0)], 0.5))
    optimizer.zero_grad()
    # A gradient that no rank has stays absent.
    adapted.adapters.get_parameter("0.weight.P").grad = torch.ones(32, 4) if rank == 1 else None
    optimizer.step()
    for name, parameter in adapted.adapters.named_parameters():
        assert (parameter.grad is not None) == (name == "0.weight.P"), name
    torch.testing.assert_close(adapted.adapters.get_parameter("0.weight.P").grad, torch.full((32, 4), 0.5))
    sharded.detach()


def is_trained_alike_with_two_optimizers() -> None:
    """Each averages what it holds; the order of steps and of requests does not matter."""

    def train(adapted: ac.AdaptedModel, parts: list[int], sharded: Any = None) -> None:
        lam = [p for n, p in adapted.adapters.named_parameters() if n.endswith("lam")]
        factors = [p for n, p in adapted.adapters.named_parameters() if not n.endswith("lam")]
        optimizers = [torch.optim.SGD(factors, lr=0.1), torch.optim.AdamW(lam, lr=0.01)]
        budget = make_budget(adapted, optimizers, compact=True)
        for step in range(STEPS):
            measure_loss(adapted, torch.cat([draw(step, part) for part in parts])).backward()
            if sharded is not None and step % 2:
                sharded.sync_gradients()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert budget.live_triplets == 2 * len(adapted.plan)

    expected, adapted = make(), make()
    train(expected, [0, 1])
    train(adapted, [dist.get_rank()], shard(adapted))
    torch.testing.assert_close(flatten(adapted), flatten(expected), rtol=0, atol=1e-5)
    assert_same_everywhere(flatten(adapted))


def is_clipped_alike() -> None:
    """Also with a head that is trained fully, whose gradient is sharded."""
    for norm_type in (2.0, float("inf")):
        expected, adapted = make(trainable=("2.*",)), make(trainable=("2.*",))
        sharded = shard(adapted)
        measure_loss(adapted, draw(0, dist.get_rank())).backward()
        measure_loss(expected, torch.cat([draw(0, 0), draw(0, 1)])).backward()
        found = sharded.clip_grad_norm_(1e-3, norm_type)
        wanted = torch.nn.utils.clip_grad_norm_(expected.trainable_parameters(), 1e-3, norm_type)
        torch.testing.assert_close(found, wanted)
        pairs = zip(adapted.trainable_parameters(), expected.trainable_parameters(), strict=True)
        for parameter, other in pairs:
            gradient: Any = parameter.grad
            whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            torch.testing.assert_close(whole, other.grad)
        sharded.detach()


def is_closure_alike() -> None:
    """Optimizers that compute gradients inside the step, of which one decides by the loss how often."""

    def make_closure(adapted: ac.AdaptedModel, optimizer: Any, parts: list[int]) -> Callable[[], torch.Tensor]:
        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = measure_loss(adapted, torch.cat([draw(0, part) for part in parts]))
            loss.backward()
            return loss

        return closure

    def train(adapted: ac.AdaptedModel, parts: list[int]) -> None:
        parameters = adapted.trainable_parameters()
        for optimizer in (
            torch.optim.SGD(parameters, lr=0.1),
            torch.optim.LBFGS(parameters, max_iter=4, line_search_fn="strong_wolfe"),
        ):
            for _ in range(2):
                optimizer.step(make_closure(adapted, optimizer, parts))  # type: ignore[no-untyped-call]

    expected, adapted = make(), make()
    train(expected, [0, 1])
    shard(adapted)
    train(adapted, [dist.get_rank()])
    assert_same_everywhere(flatten(adapted))
    torch.testing.assert_close(flatten(adapted), flatten(expected), rtol=1e-3, atol=1e-4)


def is_average_of_weights_alike() -> None:
    run, alone = start(), start(is_sharded=False)
    averages = []
    for one, parts in ((run, [dist.get_rank()]), (alone, [0, 1])):
        average = AveragedModel(one.adapted.adapters, multi_avg_fn=get_ema_multi_avg_fn(0.5))
        one.budget.follow(average)
        for step in range(STEPS):
            one.train([step], parts)
            average.update_parameters(one.adapted.adapters)
        averages.append(torch.cat([p.detach().flatten() for p in average.module.parameters()]))
    assert len(averages[0]) == len(flatten(run.adapted))
    torch.testing.assert_close(averages[0], averages[1], rtol=0, atol=1e-5)


def is_emptied_alike() -> None:
    """A site that keeps no triplet, as compaction leaves it, has nothing to average."""
    for_all = {"target": 0.5}
    results = []
    for is_sharded in (True, False):
        adapted = make()
        if is_sharded:
            shard(adapted)
        optimizer = make_optimizer(adapted)
        budget = make_budget(adapted, optimizer, compact=True, **for_all)
        for step in range(STEPS):
            parts = [dist.get_rank()] if is_sharded else [0, 1]
            measure_loss(adapted, torch.cat([draw(step, part) for part in parts])).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert 0 in budget.ranks().values()
        results.append(flatten(adapted))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    assert_same_everywhere(results[0])


def is_trained_alike_with_several_adapters() -> None:
    """With a head that is trained fully, of which each adapter has its own values."""
    results = []
    for is_sharded in (True, False):
        adapted = make(trainable=("2.*",))
        torch.manual_seed(7 + (dist.get_rank() if is_sharded else 0))  # all ranks get the start of rank 0
        adapted.add_adapter("second", config=ac.AdapterConfig(rank=3, kind="lora"))
        sharded = shard(adapted) if is_sharded else None
        for name in ("second", "default", "second"):
            adapted.use(name)
            optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
            for step in range(2):
                parts = [dist.get_rank()] if is_sharded else [0, 1]
                measure_loss(adapted, torch.cat([draw(step, part) for part in parts])).backward()
                optimizer.step()
                optimizer.zero_grad()
        results.append(flatten_all(adapted))
        if sharded is not None:
            assert_same_everywhere(results[-1])
            sharded.detach()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def is_half_precision_alike() -> None:
    """The policy computes in bfloat16, on all ranks with the same adapters in float32; gradients are near."""
    adapted = make()
    shard(adapted, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    run = make_optimizer(adapted)
    budget = make_budget(adapted, run, compact=True)
    for step in range(STEPS):
        output = adapted(draw(step, dist.get_rank()))
        assert output.dtype == torch.bfloat16
        output.float().square().mean().backward()
        if step == 0:
            torch.testing.assert_close(
                read_with_average(adapted), expect_gradients([(0, 0), (0, 1)], 0.5), rtol=0.1, atol=1e-3
            )
        run.step()
        run.zero_grad()
    assert all(p.dtype == torch.float32 for p in adapted.adapters.parameters())
    assert budget.live_triplets == 2 * len(adapted.plan)
    assert_same_everywhere(flatten(adapted))


def read_with_average(adapted: ac.AdaptedModel) -> torch.Tensor:
    found = read_gradients(adapted).clone()
    dist.all_reduce(found)
    return found / dist.get_world_size()


def is_scaled_alike() -> None:
    """A GradScaler skips a step on every rank if a gradient of one rank overflows."""
    adapted = make()
    sharded = shard(adapted)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = flatten(adapted).clone()
    for step in range(3):
        scaler.scale(measure_loss(adapted, draw(step, dist.get_rank()))).backward()
        if step == 1 and dist.get_rank() == 1:
            adapted.adapters.get_parameter("0.weight.P").grad.mul_(float("inf"))  # type: ignore[union-attr]
        sharded.sync_gradients()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(flatten(adapted), before) == (step == 1)
        before = flatten(adapted).clone()
    assert_same_everywhere(before)


def is_masked_alike(*, parts: int) -> None:
    for compact in (False, True):
        run = start(compact=compact)
        run.train(range(STEPS))
        # AdamW divides by the size of a gradient, so a small one shows the order of its sum; a step is of 1e-2.
        assert_like(run, run_alone(parts, compact=compact), atol=1e-4)
        assert_same_everywhere(flatten(run.adapted))


def do_all(*names: str) -> None:
    logging.disable(logging.WARNING)
    for name in names:
        globals()[name]()


@pytest.mark.parametrize(
    "names",
    [
        ("is_average_alike", "is_trained_alike_with_two_optimizers"),
        ("is_clipped_alike", "is_closure_alike"),
        ("is_average_of_weights_alike", "is_emptied_alike"),
        ("is_trained_alike_with_several_adapters", "is_half_precision_alike", "is_scaled_alike"),
    ],
    ids=lambda names: names[0],
)
def test_two_ranks_train_as_one_process(names: tuple[str, ...]) -> None:
    run_ranks(2, do_all, *names)


def compare_masks(parts: int) -> None:
    is_masked_alike(parts=parts)


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)])
def test_masks_and_history_are_those_of_one_process(ranks: int) -> None:
    run_ranks(ranks, compare_masks, ranks)


def train_tied() -> None:
    """A weight with two names, which FSDP2 shards once, with an adapter for both uses."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.inner = nn.Embedding(11, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(torch.tanh(self.inner(self.embedding(ids))))
            return result

    ids = torch.arange(8).view(2, 4)
    results = []
    for is_sharded in (True, False):
        torch.manual_seed(1)
        adapted = ac.compile_with_adapters(Tied(), (ids,), config=ac.AdapterConfig(rank=2, sites=("*",)))
        assert "embedding.weight" in {site.name for site in adapted.sites}
        sharded = shard(adapted) if is_sharded else None
        optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.01)
        for _ in range(3):
            part = ids[dist.get_rank() : dist.get_rank() + 1] if is_sharded else ids
            adapted(part).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(flatten(adapted))
        if sharded is not None:
            merged: Any = sharded.fold(gather="all")
            assert merged.head.weight is merged.embedding.weight
            torch.testing.assert_close(merged(ids), adapted(ids))
            sharded.detach()
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)


def test_tied_weights_are_sharded_once_and_folded_tied() -> None:
    run_ranks(2, train_tied)
