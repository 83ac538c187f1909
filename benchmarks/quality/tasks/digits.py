"""Digits that are rotated and inverted: a vision transformer with 16 tokens, a cheap one with 4, and a convolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_compiler.cli.demo.data import load_digits, rotate_and_invert
from adapter_compiler.cli.demo.model import DigitTransformer
from benchmarks.quality.tasks.base import Task, as_examples, cross_entropy, draw_splits, pretrain

#: Examples to adapt with, and the steps of pretraining.
_SHOTS, _STEPS = 200, 500


class CoarseTransformer(DigitTransformer):
    """The same with patches of 4 × 4 pixels, so with 4 tokens: a fifth of the time."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Linear(16, 64)
        self.position = nn.Parameter(torch.randn(1, 4, 64) * 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes."""
        patches = images.unflatten(2, (2, 4)).unflatten(1, (2, 4)).transpose(2, 3).flatten(3).flatten(1, 2)
        x = self.embedding(patches) + self.position
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(dim=1))
        return logits


class DigitConvolution(nn.Module):
    """Four convolutions with group normalization, whose statistics do not depend on the batch."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        sizes = ((1, width, 1), (width, width, 1), (width, 2 * width, 2), (2 * width, 2 * width, 1))
        self.layers = nn.ModuleList(nn.Conv2d(i, o, 3, stride, padding=1) for i, o, stride in sizes)
        self.norms = nn.ModuleList(nn.GroupNorm(4, o) for _, o, _ in sizes)
        self.head = nn.Linear(2 * width, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the ten classes."""
        x = images.unsqueeze(1)
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = F.relu(norm(layer(x)))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def make_digits(seed: int, draw: int) -> Task:
    """The demo's vision transformer, 16 tokens."""
    return _make("digits", DigitTransformer, seed, draw, ("blocks.*",), r"blocks\..*\.(query|key|value|output|up|down)")


def make_coarse(seed: int, draw: int) -> Task:
    """The one with 4 tokens."""
    targets = r"blocks\..*\.(query|key|value|output|up|down)"
    return _make("digits_coarse", CoarseTransformer, seed, draw, ("blocks.*",), targets)


def make_convolution(seed: int, draw: int) -> Task:
    """The convolutional network."""
    return _make("convolution", DigitConvolution, seed, draw, ("layers.*",), r"layers\.\d")


_pretrained: dict[tuple[str, int], nn.Module] = {}


def _make(name: str, cls: type[nn.Module], seed: int, draw: int, sites: tuple[str, ...], targets: str) -> Task:
    upright, held_out = load_digits(seed)
    if (name, seed) not in _pretrained:
        torch.manual_seed(seed)
        _pretrained[name, seed] = pretrain(cls(), as_examples(upright), cross_entropy, steps=_STEPS, seed=seed)
    changed = as_examples(rotate_and_invert(upright))
    train, validation = draw_splits(changed, draw, _SHOTS)
    return Task(
        name=name,
        model=_pretrained[name, seed],
        train=train,
        validation=validation,
        test=as_examples(rotate_and_invert(held_out)),
        sites=sites,
        targets=targets,
    )
