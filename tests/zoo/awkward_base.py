"""What the awkward modules share: their inputs, raw parameters, and how one becomes an entry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.entry import ZooEntry, no_kwargs

WIDTH = 16
HIDDEN = 24
TOKENS = 32


def make_weight(*shape: int) -> nn.Parameter:
    """A random parameter, scaled by its last axis."""
    return nn.Parameter(torch.randn(*shape) / math.sqrt(shape[-1]))


def make_mlp(out: int = WIDTH) -> nn.Sequential:
    """Two linear layers with a ReLU between."""
    return nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, out))


class Weights(nn.Module):
    """Raw parameters by name, and a function of the module and its input that uses them."""

    def __init__(self, use: Callable[[Any, Tensor], Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.use = use
        for name, shape in shapes.items():
            self.register_parameter(name, make_weight(*shape))

    def forward(self, x: Tensor) -> Any:
        return self.use(self, x)


def rows(batch: int, length: int) -> tuple[Any, ...]:
    """One float32 tensor (batch, WIDTH)."""
    return (torch.randn(batch, WIDTH),)


def sequences(batch: int, length: int) -> tuple[Any, ...]:
    """One float32 tensor (batch, length, WIDTH)."""
    return (torch.randn(batch, length, WIDTH),)


def two_sequences(batch: int, length: int) -> tuple[Any, ...]:
    """Two float32 tensors: (batch, length, WIDTH) and (batch, length + 2, WIDTH)."""
    return torch.randn(batch, length, WIDTH), torch.randn(batch, length + 2, WIDTH)


def two_rows(batch: int, length: int) -> tuple[Any, ...]:
    """Two float32 tensors (batch, WIDTH)."""
    return torch.randn(batch, WIDTH), torch.randn(batch, WIDTH)


def tokens(batch: int, length: int) -> tuple[Any, ...]:
    """One int64 tensor (batch, length) of token ids."""
    return (torch.randint(0, TOKENS, (batch, length)),)


def signals(batch: int, length: int) -> tuple[Any, ...]:
    """One float32 tensor (batch, WIDTH, length): channels before time."""
    return (torch.randn(batch, WIDTH, length),)


def images(batch: int, length: int) -> tuple[Any, ...]:
    """One float32 tensor (batch, 3, 16, 16)."""
    return (torch.randn(batch, 3, 16, 16),)


def describe_awkward(
    name: str,
    build: Callable[[], nn.Module],
    args: Callable[[int, int], tuple[Any, ...]] = rows,
    *traits: str,
    inputs: Callable[[int, int], dict[str, Any]] = no_kwargs,
    description: str = "",
    size: tuple[int, int] = (2, 8),
    other_size: tuple[int, int] = (3, 12),
) -> ZooEntry:
    """An entry for a hand-written module; a class describes itself by its docstring."""
    return ZooEntry(
        name=name,
        group="awkward",
        build=build,
        args=args,
        inputs=inputs,
        description=description or (inspect.getdoc(build) or "").partition("\n")[0],
        traits=frozenset(traits),
        size=size,
        other_size=other_size,
    )


def describe_weights(
    name: str,
    description: str,
    use: Callable[[Any, Tensor], Any],
    args: Callable[[int, int], tuple[Any, ...]] = sequences,
    traits: Collection[str] = (),
    **shapes: tuple[int, ...],
) -> ZooEntry:
    """An entry for raw parameters and what is computed from them."""
    return describe_awkward(name, lambda: Weights(use, **shapes), args, *traits, description=description)
