"""What one model of the zoo is, and how any output becomes a loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


def no_args(batch: int, length: int) -> tuple[Any, ...]:
    """No positional arguments: what most entries are called with."""
    return ()


def no_kwargs(batch: int, length: int) -> dict[str, Any]:
    """No keyword arguments: for entries that are called with positional ones only."""
    return {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ZooEntry:
    """A tiny model with the calls that exercise it.

    `build`, `inputs` and `args` draw from torch's global generator, so that a seed set before fixes them.
    `inputs` and `args` give the keyword and the positional arguments for a batch size and a length; an entry
    without an axis for one of them ignores it. `size` and `other_size` are two (batch, length) pairs at which
    the model must run.
    """

    name: str
    group: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Any]] = no_kwargs
    args: Callable[[int, int], tuple[Any, ...]] = no_args
    description: str = ""
    traits: frozenset[str] = frozenset()
    size: tuple[int, int] = (2, 8)
    other_size: tuple[int, int] = (3, 12)

    def example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of one call, positional and by keyword."""
        return self.args(*self.size), self.inputs(*self.size)

    def other_example(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of a call at another batch size and, where there is one, another length."""
        return self.args(*self.other_size), self.inputs(*self.other_size)


def in_float64(entry: ZooEntry) -> ZooEntry:
    """The same model in float64: normalized over so few values that float32 gives other gradients at each order."""

    def widen(made: Any) -> Any:
        return pytree.tree_map_only(Tensor, lambda t: t.double() if t.dtype == torch.float32 else t, made)

    return dataclasses.replace(
        entry,
        build=lambda: entry.build().double(),
        inputs=lambda *size: widen(entry.inputs(*size)),
        args=lambda *size: widen(entry.args(*size)),
    )


def find_tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor inside a model's output: mappings, sequences, dataclasses and plain objects are entered."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from find_tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from find_tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):
        yield from find_tensors(vars(value))


def loss_of(output: Any) -> Tensor:
    """A scalar to differentiate: the output's own loss, else the mean squares of its differentiable tensors.

    Raises ValueError where nothing in the output requires grad.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.mean()
    squares = [
        tensor.abs().square().mean().to(torch.float64) for tensor in find_tensors(output) if tensor.requires_grad
    ]
    if not squares:
        raise ValueError("no tensor of the output requires grad, so there is nothing to differentiate")
    return torch.stack(squares).sum()
