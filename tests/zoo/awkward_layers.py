"""Awkward layers: tied, shared, idle, parametrized, of other dtypes, convolutions."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from tests.zoo.awkward_base import (
    HIDDEN,
    TOKENS,
    WIDTH,
    describe_awkward,
    make_weight,
    rows,
    sequences,
    signals,
    tokens,
    two_rows,
)


class TiedAutoencoder(nn.Module):
    """One weight encodes as W and decodes as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = make_weight(HIDDEN, WIDTH)
        self.bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.weight).tanh(), self.weight.t(), self.bias)


class TiedHead(nn.Module):
    """The embedding's table is also the head's weight, as one Parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.mix = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Any:
        return self.head(self.mix(self.embed(ids)).relu())


class FlatParameter(nn.Module):
    """Every layer's weight is a view of one flat Parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.flat = nn.Parameter(torch.randn(WIDTH * HIDDEN * 2) / 4)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        up, down = self.flat.split(WIDTH * HIDDEN)
        return self.head(F.linear(F.linear(x, up.view(HIDDEN, WIDTH)).relu(), down.view(WIDTH, HIDDEN)))


class TransposedParameter(nn.Module):
    """The Parameter itself is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter((torch.randn(WIDTH, HIDDEN) / 4).t())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


class UnusedWeight(nn.Module):
    """One layer's result is thrown away, another layer is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.dead, self.idle = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        self.dead(x)
        return self.used(x)


class MaskedLinear(nn.Module):
    """Autoregressive masks cut connections out of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("mask", torch.ones(WIDTH, WIDTH).tril())

    def forward(self, x: Tensor) -> Tensor:
        mask = self.get_buffer("mask")
        hidden = F.linear(x, self.up.weight * mask, self.up.bias).relu()
        return F.linear(hidden, self.down.weight * mask, self.down.bias)


class Hypernetwork(nn.Module):
    """One network computes the weight that another layer uses, a weight for each row."""

    def __init__(self) -> None:
        super().__init__()
        self.generate = nn.Linear(WIDTH, WIDTH * WIDTH)
        self.scale = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        weights = self.generate(context).view(-1, WIDTH, WIDTH) / WIDTH
        return torch.bmm(weights, self.scale(x).unsqueeze(2)).squeeze(2)


class Normalized(nn.Module):
    """Three parametrized layers: weight norm, spectral norm, orthogonal."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(WIDTH, HIDDEN))
        self.second = parametrizations.spectral_norm(nn.Linear(HIDDEN, WIDTH))
        self.third = parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Any:
        return self.third(self.second(self.first(x).relu()).relu())


class HookedNorm(nn.Module):
    """The older spectral norm, whose forward pre-hook sets the weight."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.utils.spectral_norm(nn.Linear(WIDTH, HIDDEN))

    def forward(self, x: Tensor) -> Any:
        return self.linear(x)


class Convolutions(nn.Module):
    """Grouped, depthwise, dilated, strided and transposed convolutions over time."""

    def __init__(self) -> None:
        super().__init__()
        self.grouped = nn.Conv1d(WIDTH, HIDDEN, 3, padding=1, groups=4)
        self.depthwise = nn.Conv1d(HIDDEN, HIDDEN, 3, padding="same", groups=HIDDEN, dilation=2)
        self.strided = nn.Conv1d(HIDDEN, WIDTH, 4, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(WIDTH, WIDTH, 4, stride=2, padding=1, groups=2)

    def forward(self, x: Tensor) -> Any:
        return self.up(self.strided(self.depthwise(self.grouped(x)).relu()))


class VideoConvolution(nn.Module):
    """Three-dimensional and pointwise convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv3d(3, WIDTH, (2, 4, 4), stride=(2, 4, 4))
        self.point = nn.Conv3d(WIDTH, HIDDEN, 1)

    def forward(self, x: Tensor) -> Any:
        return self.point(self.patch(x).relu()).mean(dim=(2, 3, 4))


class DualDtype(nn.Module):
    """Layers of float64 and of bfloat16 in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(WIDTH, HIDDEN, dtype=torch.float64)
        self.narrow = nn.Linear(HIDDEN, WIDTH, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Any:
        return self.narrow(self.wide(x.double()).tanh().bfloat16())


class ComplexWeights(nn.Module):
    """A complex weight mixes frequencies between two Fourier transforms."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / 4)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        spectrum = torch.fft.fft(x, dim=1) @ self.mix
        return self.out(torch.fft.ifft(spectrum, dim=1).real)


class Quantized(nn.Module):
    """Weights rounded to a grid, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def round(self, weight: Tensor) -> Tensor:
        step = weight.detach().abs().amax() / 7
        return weight + ((weight / step).round() * step - weight).detach()

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.linear(x, self.round(self.up.weight), self.up.bias).relu()
        return F.linear(hidden, self.round(self.down.weight), self.down.bias)


class TaskWeights(nn.Module):
    """Each row picks the weight of its task out of a stack by index."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = make_weight(3, HIDDEN, WIDTH)

    def forward(self, x: Tensor, task: Tensor) -> Tensor:
        return torch.bmm(self.stack[task], x.unsqueeze(2)).squeeze(2)


class Containers(nn.Module):
    """Parameters live in a ParameterList and a ParameterDict."""

    def __init__(self) -> None:
        super().__init__()
        self.listed = nn.ParameterList([make_weight(WIDTH, WIDTH) for _ in range(2)])
        self.named = nn.ParameterDict({"left": make_weight(WIDTH, WIDTH), "right": make_weight(WIDTH, WIDTH)})

    def forward(self, x: Tensor) -> Any:
        for weight in self.listed:
            x = (x @ weight).relu()
        return (x @ self.named["left"]) * (x @ self.named["right"])


class FrozenBase(nn.Module):
    """The first layers do not require grad; only the head does."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, WIDTH)).requires_grad_(False)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.base(x))


def rows_and_tasks(batch: int, length: int) -> tuple[Any, ...]:
    """Rows and the index of a task for each."""
    return torch.randn(batch, WIDTH), torch.randint(0, 3, (batch,))


def clips(batch: int, length: int) -> tuple[Any, ...]:
    """One float32 tensor (batch, 3, 4, 8, 8)."""
    return (torch.randn(batch, 3, 4, 8, 8),)


LAYERS = (
    describe_awkward("tied-autoencoder", TiedAutoencoder, rows, "tied"),
    describe_awkward("tied-head", TiedHead, tokens, "tied"),
    describe_awkward("flat-parameter", FlatParameter),
    describe_awkward("transposed-parameter", TransposedParameter),
    describe_awkward("unused-weight", UnusedWeight, rows, "no-gradient"),
    describe_awkward("masked-linear", MaskedLinear, rows, "buffers"),
    describe_awkward("hypernetwork", Hypernetwork, two_rows),
    describe_awkward("parametrizations", Normalized, rows, "parametrization", "buffers"),
    describe_awkward("hooked-spectral-norm", HookedNorm, rows, "hooks", "buffers"),
    describe_awkward("convolutions", Convolutions, signals, "convolution"),
    describe_awkward("video-convolution", VideoConvolution, clips, "convolution"),
    describe_awkward("dual-dtype", DualDtype, rows, "dtype"),
    describe_awkward("complex-weights", ComplexWeights, sequences, "complex"),
    describe_awkward("quantized", Quantized),
    describe_awkward("task-weights", TaskWeights, rows_and_tasks),
    describe_awkward("parameter-containers", Containers),
    describe_awkward("frozen-base", FrozenBase, rows, "no-gradient"),
    describe_awkward("bilinear", functools.partial(nn.Bilinear, WIDTH, WIDTH, 8), two_rows, description="nn.Bilinear"),
)
