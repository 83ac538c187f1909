"""Training in a random subspace: θ = θ₀ + P z, where z has d elements and P [D, d] orthonormal columns.

Each of the D weights belongs to one coordinate of z, with a random sign, and a column is divided by the root of the
number of its weights (the one-hot projection of Uni-LoRA, arXiv 2506.00799, with signs). Coordinate and sign are hashes
of the weight's number, computed again whenever they are needed. So nothing of P is stored but d numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

#: Weights that are hashed at a time; a chunk takes three times as many bytes times eight.
_CHUNK = 1 << 20

#: Odd constants of splitmix64 as signed numbers; products wrap around, as hashing wants it.
_STEP, _FIRST, _SECOND = -7046029254386353131, -4658895280553007687, -7723592293110705685


class SubspaceModel(nn.Module):
    """A model of which only z trains; its weights are W + the part of P z that belongs to them.

    Attributes:
        module: the user's module, whose parameters do not train.
        z: [d], zeros at the start; the only parameter that requires grad.
    """

    def __init__(self, module: nn.Module, names: Sequence[str], dimension: int, seed: int) -> None:
        """Take the weights of these names.

        Args:
            module: the module; its parameters must not require grad.
            names: qualified names of parameters.
            dimension: d.
            seed: of the projection.
        """
        super().__init__()
        self.module = module
        weights = {name: module.get_parameter(name) for name in names}
        self._offsets = _find_offsets(weights)
        first = next(iter(weights.values()))
        dtype = torch.promote_types(first.dtype, torch.float32)
        self.z = nn.Parameter(torch.zeros(dimension, dtype=dtype, device=first.device))
        self._seed = seed
        self.register_buffer("lengths", self._measure_lengths(weights).to(dtype), persistent=False)
        self.train(module.training)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these arguments in the subspace."""
        return functional_call(self.module, self.find_weights(), args, kwargs)

    def find_weights(self) -> dict[str, torch.Tensor]:
        """W + (P z) by name."""
        scaled = self.z / self.get_buffer("lengths")
        found = {}
        for name, offset in self._offsets.items():
            weight = self.module.get_parameter(name)
            update = _Expand.apply(scaled, offset, weight.numel(), self._seed)  # type: ignore[no-untyped-call]
            found[name] = weight + update.view(weight.shape).to(weight.dtype)
        return found

    def _measure_lengths(self, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The length of each column before it is normalized; 1 for coordinates without a weight."""
        counts = torch.zeros(len(self.z), dtype=torch.float64, device=self.z.device)
        for name, weight in weights.items():
            for start, end in _split(weight.numel()):
                index, _ = find_places(self._offsets[name] + start, end - start, len(counts), self._seed, counts.device)
                counts += torch.bincount(index, minlength=len(counts))
        return counts.clamp_min(1).sqrt()


class _Expand(torch.autograd.Function):
    """z → the n numbers z[h(i)] s(i), i from ``offset`` on; backward computes h and s again."""

    @staticmethod
    def forward(ctx: Any, z: torch.Tensor, offset: int, count: int, seed: int) -> torch.Tensor:
        ctx.where, ctx.like = (offset, count, seed), z.detach().new_empty(0)
        ctx.size = len(z)
        found = z.new_empty(count)
        for start, end in _split(count):
            index, sign = find_places(offset + start, end - start, len(z), seed, z.device)
            found[start:end] = z[index] * sign
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,), (offset, count, seed) = gradients, ctx.where
        found = gradient.new_zeros(ctx.size)
        for start, end in _split(count):
            index, sign = find_places(offset + start, end - start, ctx.size, seed, gradient.device)
            found.index_add_(0, index, gradient[start:end] * sign)
        return found, None, None, None


def find_places(
    first: int, count: int, dimension: int, seed: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The coordinates h(i) [count] from 0 to d − 1, and the signs s(i) [count], of the weights from ``first`` on.

    They are independent of the device and of how weights are split.
    """
    numbers = torch.arange(first + 1, first + count + 1, device=device) + (seed << 40)
    bits = _mix(numbers * _STEP)
    sign = 1 - 2 * (bits & 1)
    return (_shift(bits, 1) % dimension), sign


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """The finalizer of splitmix64."""
    bits = (bits ^ _shift(bits, 30)) * _FIRST
    bits = (bits ^ _shift(bits, 27)) * _SECOND
    return bits ^ _shift(bits, 31)


def _shift(bits: torch.Tensor, count: int) -> torch.Tensor:
    """A logical shift to the right."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _split(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, _CHUNK):
        yield start, min(start + _CHUNK, count)


def _find_offsets(weights: Mapping[str, torch.Tensor]) -> dict[str, int]:
    offsets, total = {}, 0
    for name, weight in weights.items():
        offsets[name], total = total, total + weight.numel()
    return offsets


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """A context in which no parameter of a module requires grad."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        module.requires_grad_(False)
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
