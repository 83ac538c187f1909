"""After sharding, each rank holds its part of the base and nothing else of it."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.integrations import shard
from tests.integrations.fsdp.runs import Block, draw, make_optimizer
from tests.ranks import run_ranks


def make_watched() -> tuple[nn.Module, list[weakref.ref[np.ndarray]]]:
    """A model whose weights are numpy's memory, which ends when the last tensor over it does."""
    model = nn.Sequential(nn.Linear(16, 32), nn.Sequential(Block(), Block()), nn.Linear(32, 19))
    watched = []
    for parameter in model.parameters():
        memory = parameter.detach().numpy().copy()
        watched.append(weakref.ref(memory))
        parameter.data = torch.from_numpy(memory)
    return model, watched


def count_alive(watched: list[weakref.ref[np.ndarray]]) -> int:
    gc.collect()
    return sum(one() is not None for one in watched)


def train_and_count(is_inplace: bool) -> None:
    torch.manual_seed(0)
    model, watched = make_watched()
    adapted = ac.compile_with_adapters(model, (draw(0, 0),), config=ac.AdapterConfig(rank=2, inplace=is_inplace))
    sharded = shard(adapted)
    assert count_alive(watched) == (0 if is_inplace else len(watched))
    del model
    assert count_alive(watched) == 0
    optimizer = make_optimizer(adapted)
    for step in range(2):
        adapted(draw(step, 0)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    # Between calls, FSDP2 keeps gathered what is outside of the blocks; it has given the blocks back.
    parameters = dict(adapted.module.named_parameters())
    held = {name: p for name, p in parameters.items() if not hasattr(p, "full_tensor")}
    assert not any(name.startswith("1.") for name in held)
    whole = sum(p.numel() * 4 for p in parameters.values())
    assert sharded.bytes_whole == whole
    assert sharded.bytes_here <= whole // 2 + 4 * 32 * len(parameters)


def test_the_full_weights_are_gone() -> None:
    """A model that was compiled in place at once, any other with the user's last reference to it."""
    for is_inplace in (True, False):
        run_ranks(2, train_and_count, is_inplace)
