"""Awkward state and contexts: buffers, random numbers, gradient modes, checkpoints, functional calls."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.zoo.awkward_base import HIDDEN, WIDTH, describe_awkward, images, make_mlp, make_weight, rows, sequences


class RunningMean(nn.Module):
    """A running mean and a counter are updated in place, in training only."""

    mean: Tensor
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: Tensor) -> Any:
        if self.training:
            with torch.no_grad():
                self.mean.mul_(0.9).add_(0.1 * x.mean(0))
                self.calls += 1
        return self.body(x - self.mean)


class ReplacedBuffer(nn.Module):
    """A buffer is replaced by a new tensor on every call."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()
        self.register_buffer("last", torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Any:
        y = self.body(x) + self.last
        self.last = y.detach().mean(0)
        return y


class PythonCounter(nn.Module):
    """A plain Python number counts the calls and warms a factor up."""

    def __init__(self) -> None:
        super().__init__()
        self.body = make_mlp()
        self.calls = 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.body(x) * min(1.0, 0.5 + 0.1 * self.calls)


class BatchNorms(nn.Module):
    """Batch normalization of rows and of images, with dropout of values and of channels."""

    def __init__(self) -> None:
        super().__init__()
        self.convolve, self.norm2d = nn.Conv2d(3, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.linear, self.norm1d = nn.Linear(WIDTH, HIDDEN), nn.BatchNorm1d(HIDDEN, momentum=None)
        self.channels, self.values = nn.Dropout2d(0.2), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        x = self.channels(self.norm2d(self.convolve(x)).relu())
        return self.values(self.norm1d(self.linear(x.mean((2, 3)))))


class AlwaysDropout(nn.Module):
    """Monte-Carlo dropout: random in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.dropout(self.up(x).relu(), 0.5, training=True))


class ShapedNoise(nn.Module):
    """Noise from a shape alone: torch.randn, torch.rand and torch.randperm with no tensor argument."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = make_mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        noise = torch.randn(x.shape[0], WIDTH) * torch.rand(1)
        return self.head(self.body(x + 0.1 * noise)[:, torch.randperm(WIDTH)])


class Variational(nn.Module):
    """A variational autoencoder: the sample comes from the statistics, with a loss of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = make_mlp(16), nn.Linear(8, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encode(x).chunk(2, dim=-1)
        decoded = self.decode(mean + torch.randn_like(mean) * (log_variance / 2).exp())
        divergence = (mean.square() + log_variance.exp() - log_variance - 1).mean() / 2
        return {"loss": F.mse_loss(decoded, x) + divergence, "decoded": decoded}


class AutocastRegion(nn.Module):
    """A part of forward runs under autocast to bfloat16, and a part of that without."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Any:
        x = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.inner(x).relu()
            with torch.autocast("cpu", enabled=False):
                x = self.last(x.float())
        return x


class MomentumEncoder(nn.Module):
    """A target network, updated in forward from the online one and run under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        self.online, self.predict = make_mlp(), nn.Linear(WIDTH, WIDTH)
        self.target = copy.deepcopy(self.online).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if self.training:
                for target, online in zip(self.target.parameters(), self.online.parameters(), strict=True):
                    target.lerp_(online, 0.1)
            wanted = self.target(x + 0.1)
        return 2 - 2 * F.cosine_similarity(self.predict(self.online(x)), wanted, dim=-1)


class Checkpointed(nn.Module):
    """Blocks under torch.utils.checkpoint in training, with dropout inside."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.use_reentrant = use_reentrant
        self.first = nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList([nn.Sequential(make_mlp(), nn.Dropout(0.1)) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            y = checkpoint(block, x, use_reentrant=self.use_reentrant) if self.training else block(x)
            x = x + y
        return x


class InnerGradient(nn.Module):
    """Forces: the derivative of an energy by the input is part of forward, in eval mode too."""

    def __init__(self) -> None:
        super().__init__()
        self.energy = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(x).sum(-1)
            (force,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
        return energy, -force


class InPlace(nn.Module):
    """Results are written into slices, by out= and by index."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        y = x.new_zeros(x.shape[0], 2 * HIDDEN)
        y[:, :HIDDEN] = self.left(x)
        y[:, HIDDEN:] += self.right(x).relu_()
        y[y.abs() < 0.01] = 0.0
        return y.mul_(2.0)


class FunctionalCall(nn.Module):
    """An inner module is called with weights that forward computed: one step of gradient descent on them."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.shift = nn.Linear(WIDTH, WIDTH), make_weight(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        weights = {"weight": self.inner.weight + 0.1 * self.shift, "bias": self.inner.bias}
        return torch.func.functional_call(self.inner, weights, (x,))


class Ensemble(nn.Module):
    """torch.vmap over a stack of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = make_weight(3, HIDDEN, WIDTH), make_weight(3, WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        def member(up: Tensor, down: Tensor) -> Tensor:
            return F.linear(F.linear(x, up).relu(), down)

        return torch.vmap(member)(self.up, self.down).mean(0)


def apply_gate(x: Tensor, gate: Tensor) -> Tensor:
    """The gated mean over the second axis, if there is one."""
    if x.dim() > 2:
        x = x.mean(1)
        gate = gate.mean(1)
    return x * torch.sigmoid(gate)


@functools.cache
def compile_gate() -> Callable[[Tensor, Tensor], Tensor]:
    """The gate compiled by TorchScript, once."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        compiled: Callable[[Tensor, Tensor], Tensor] = torch.jit.script(apply_gate)
    return compiled


class ScriptedFunction(nn.Module):
    """A function compiled by TorchScript is called in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(WIDTH, HIDDEN), nn.Linear(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Any:
        return compile_gate()(self.value(x), self.gate(x))


def build_reentrant() -> nn.Module:
    """Checkpoints of the older, reentrant kind."""
    return Checkpointed(use_reentrant=True)


def build_non_reentrant() -> nn.Module:
    """Checkpoints of the newer, non-reentrant kind."""
    return Checkpointed(use_reentrant=False)


STATE = (
    describe_awkward("running-mean", RunningMean, rows, "buffers", "mode"),
    describe_awkward("replaced-buffer", ReplacedBuffer, rows, "buffers"),
    describe_awkward("python-counter", PythonCounter, rows, "python-state"),
    describe_awkward("batch-norms", BatchNorms, images, "buffers", "convolution"),
    describe_awkward("always-dropout", AlwaysDropout, rows, "rng"),
    describe_awkward("shaped-noise", ShapedNoise, rows, "rng"),
    describe_awkward("variational", Variational, rows, "rng"),
    describe_awkward("autocast-region", AutocastRegion, rows, "autocast", "dtype"),
    describe_awkward("momentum-encoder", MomentumEncoder, rows, "no-gradient", "mode", "updated-parameters"),
    describe_awkward("checkpoint-reentrant", build_reentrant, rows, "checkpoint"),
    describe_awkward("checkpoint", build_non_reentrant, rows, "checkpoint"),
    describe_awkward("inner-gradient", InnerGradient, rows, "inner-gradient"),
    describe_awkward("in-place", InPlace),
    describe_awkward("functional-call", FunctionalCall),
    describe_awkward("ensemble", Ensemble, sequences, "experts"),
    describe_awkward("scripted-function", ScriptedFunction, sequences, "script"),
)
