"""Awkward control flow: what the values, the shapes, the mode or an exception decide."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.awkward_base import WIDTH, describe_awkward, make_mlp, rows


class DataDependentBranch(nn.Module):
    """The values of the input decide which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.head = make_mlp(), make_mlp(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        x = self.left(x) if x.sum() > 0 else self.right(x)
        return self.head(x)


class DataDependentLoop(nn.Module):
    """A layer is repeated until its output is small."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        rounds = 0
        while rounds < 6 and x.abs().mean() > 0.1:
            x, rounds = 0.5 * self.step(x).tanh(), rounds + 1
        return self.head(x)


class LayerDrop(nn.Module):
    """Whole layers are skipped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([make_mlp() for _ in range(4)])
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        for layer in self.layers:
            if not self.training or torch.rand(()) > 0.3:
                x = x + layer(x)
        return self.head(x)


class EarlyExit(nn.Module):
    """In eval mode a confident batch leaves after the first block; training returns every exit."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([make_mlp() for _ in range(3)])
        self.exits = nn.ModuleList([nn.Linear(WIDTH, 8) for _ in range(3)])

    def forward(self, x: Tensor) -> Any:
        results = []
        for block, leave in zip(self.blocks, self.exits, strict=True):
            x = x + block(x)
            results.append(leave(x))
            if not self.training and results[-1].softmax(-1).amax() > 0.25:
                break
        return results if self.training else results[-1]


class BatchOfOne(nn.Module):
    """A batch of one takes another path than a larger one."""

    def __init__(self) -> None:
        super().__init__()
        self.single, self.many = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        if x.shape[0] == 1:
            return self.single(x.squeeze(0)).unsqueeze(0)
        return self.many(x - x.mean(0))


class ScalarRead(nn.Module):
    """A Python number is read out of a tensor and steers a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = make_mlp(), make_mlp()

    def forward(self, x: Tensor) -> Any:
        scale = float(x.detach().abs().max().item())
        return self.outer(self.inner(x / scale)) * scale


class ThroughNumpy(nn.Module):
    """A part of the work is done by numpy."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = make_mlp(), make_mlp()

    def forward(self, x: Tensor) -> Any:
        hidden = self.inner(x)
        order = torch.from_numpy(hidden.detach().numpy().mean(0).argsort())
        return self.outer(hidden[:, order])


class Recovers(nn.Module):
    """An exception is part of the usual flow."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(2 * WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        try:
            return self.wide(x)
        except RuntimeError:
            return self.narrow(x)


CONTROL = (
    describe_awkward("data-dependent-branch", DataDependentBranch, rows, "data-dependent"),
    describe_awkward("data-dependent-loop", DataDependentLoop, rows, "data-dependent"),
    describe_awkward("layer-drop", LayerDrop, rows, "layer-drop", "rng", "data-dependent"),
    describe_awkward("early-exit", EarlyExit, rows, "data-dependent", "mode"),
    describe_awkward("batch-of-one", BatchOfOne, rows, "shape-dependent"),
    describe_awkward("scalar-read", ScalarRead, rows, "data-dependent"),
    describe_awkward("through-numpy", ThroughNumpy, rows, "data-dependent"),
    describe_awkward("recovers", Recovers),
)
