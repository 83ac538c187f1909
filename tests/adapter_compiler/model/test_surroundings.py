"""What users put around a model in training: torch.compile, autocast, activation checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac

WIDTH = 16


class Block(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(-1, (2, -1)).transpose(1, 2) for part in (self.query, self.key, self.value))
        p = self.p if self.training else 0.0
        y = nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=p).transpose(1, 2).flatten(2)
        x = x + nn.functional.dropout(self.out(y), p)
        update: Tensor = self.down(nn.functional.gelu(self.up(self.norm(x))))
        return x + update


@pytest.fixture(autouse=True)
def everything_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small activations would use torch's operators."""
    monkeypatch.setattr("passes.fuse.memory_efficient_ops._SMALL", 0)
    monkeypatch.setattr("passes.fuse.fused_ops._SMALL", 0)
    monkeypatch.setattr("passes.fuse.fused_ops._FEW_ROWS", 0)


def adapt(p: float = 0.0, **options: Any) -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = nn.Sequential(Block(p), Block(p))
    config = ac.AdapterConfig(rank=4, alpha=4, gamma=0.1, **options)
    adapted = ac.compile_with_adapters(model, (torch.randn(3, 5, WIDTH),), config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    return adapted


def run(adapted: ac.AdaptedModel, call: Callable[..., Tensor], x: Tensor) -> list[Tensor]:
    """Output and gradients under one random state."""
    torch.manual_seed(1)
    adapted.zero_grad()
    y = call(x)
    y.float().square().mean().backward()
    return [y.detach(), *(p.grad.clone() for p in adapted.trainable_parameters() if p.grad is not None)]


def assert_close(found: list[Tensor], expected: list[Tensor], **tolerance: float) -> None:
    assert len(found) == len(expected) == 1 + 12 * 3
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance.get("rtol", 1e-5), atol=tolerance.get("atol", 1e-6))


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    """Ignore warnings of torch's compiler about itself: it reads ``grad`` of all tensors, and uses deprecated names."""
    for warning in (
        "ignore:The .grad attribute of a Tensor:UserWarning",
        "ignore:.*should not be instantiated:DeprecationWarning",
        "ignore:.*torch.jit.script_method.*:DeprecationWarning",
    ):
        test = pytest.mark.filterwarnings(warning)(test)
    return test


BACKENDS = [
    pytest.param("aot_eager", marks=[]),
    pytest.param(
        "inductor",
        marks=[pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")],
    ),
]


@compiles
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_adapted_model_compiles_whole(backend: str) -> None:
    adapted = adapt()
    x = torch.randn(3, 5, WIDTH)
    expected = run(adapted, adapted, x)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    assert_close(run(adapted, torch.compile(adapted, backend=backend), x), expected, rtol=1e-4, atol=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]


@compiles
@pytest.mark.slow
def test_a_compiled_model_trains_through_compaction() -> None:
    ends = []
    for is_compiled in (False, True):
        adapted = adapt()
        torch._dynamo.reset()
        call: Any = torch.compile(adapted, backend="aot_eager") if is_compiled else adapted
        optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
        schedule = ac.BudgetSchedule(
            target_rank=2, total_steps=4, warmup_steps=0, final_steps=2, interval=1, compact=True
        )
        budget = ac.RankBudget(adapted, optimizer, schedule)
        for step in range(4):
            torch.manual_seed(step)
            call(torch.randn(3, 5, WIDTH)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append((budget.ranks(), [p.detach() for p in adapted.trainable_parameters()]))
    assert sum(ends[0][0].values()) == 24
    assert ends[1][0] == ends[0][0]
    torch.testing.assert_close(ends[1][1], ends[0][1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_in_training(dtype: torch.dtype) -> None:
    x = torch.randn(3, 5, WIDTH)
    found = []
    for fused in (True, False):
        adapted = adapt(0.2, fused=fused)
        with torch.autocast("cpu", dtype):
            found.append(run(adapted, adapted, x))
    assert found[0][0].dtype == found[1][0].dtype
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * float(other.abs().max()))


@pytest.mark.parametrize("regions", [(), (Block,)])
def test_activation_checkpoints_change_no_bit(regions: Any) -> None:
    """Dropout draws the same numbers when a region is recomputed."""
    x = torch.randn(3, 5, WIDTH)
    found = []
    for checkpoint in (False, True):
        adapted = adapt(0.2, checkpoint=checkpoint, regions=regions)
        found.append(run(adapted, adapted, x))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_fused_is_unfused_in_training_with_dropout() -> None:
    x = torch.randn(3, 5, WIDTH)
    found = []
    for fused in (True, False):
        adapted = adapt(0.2, fused=fused)
        found.append(run(adapted, adapted, x))
    assert_close(*found)
