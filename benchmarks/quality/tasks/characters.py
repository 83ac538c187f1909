"""Language modelling: a causal transformer over bytes learns Python code, and is adapted to English prose.

Both texts come with Python: modules of its standard library, and the topics of its help.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import pydoc_data.topics
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_compiler.cli.demo.model import FeedForward
from benchmarks.quality.tasks.base import BITS, Examples, Task, cross_entropy, pretrain

_LENGTH, _WIDTH, _DEPTH, _HEADS, _BYTES = 64, 96, 3, 4, 128
_STEPS, _TRAIN, _TEST = 1500, 400, 512
#: Modules whose source is learned first.
_MODULES = ("argparse", "typing", "inspect", "datetime", "doctest", "pickle", "tarfile", "decimal", "subprocess")


class CausalAttention(nn.Module):
    """Self-attention that looks back only, written with plain products."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.output = (nn.Linear(_WIDTH, _WIDTH) for _ in range(4))
        self.register_buffer("ahead", torch.ones(_LENGTH, _LENGTH, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, length, width] to the same shape."""
        q, k, v = (p(x).unflatten(-1, (_HEADS, -1)).transpose(-3, -2) for p in (self.query, self.key, self.value))
        scores = (q @ k.mT / math.sqrt(_WIDTH // _HEADS)).masked_fill(self.ahead, -math.inf)
        y: Tensor = self.output((F.softmax(scores, -1) @ v).transpose(-3, -2).flatten(-2))
        return y


class ByteModel(nn.Module):
    """Logits of the next byte, [batch, length, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_BYTES, _WIDTH)
        self.position = nn.Parameter(torch.randn(1, _LENGTH, _WIDTH) * 0.02)
        self.attention = nn.ModuleList(CausalAttention() for _ in range(_DEPTH))
        self.mlp = nn.ModuleList(FeedForward(_WIDTH, 4 * _WIDTH) for _ in range(_DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(2 * _DEPTH + 1))
        self.head = nn.Linear(_WIDTH, _BYTES)

    def forward(self, tokens: Tensor) -> Tensor:
        """[batch, length] of bytes."""
        x = self.embedding(tokens) + self.position
        for depth, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * depth](x))
            x = x + mlp(self.norms[2 * depth + 1](x))
        logits: Tensor = self.head(self.norms[-1](x))
        return logits


def make_characters(seed: int, draw: int) -> Task:
    """The byte model after code; the training, validation and test parts of the prose do not overlap."""
    prose = _cut(_read_prose())
    order = torch.randperm(len(prose[1]) - _TEST, generator=torch.Generator().manual_seed(97 * seed + draw))
    rows = {"train": order[:_TRAIN], "validation": order[_TRAIN : _TRAIN + _TEST // 2]}
    parts = {name: ({"tokens": prose[0]["tokens"][r]}, prose[1][r]) for name, r in rows.items()}
    return Task(
        name="characters",
        model=_pretrain(seed),
        test=({"tokens": prose[0]["tokens"][-_TEST:]}, prose[1][-_TEST:]),
        sites=("attention.*", "mlp.*"),
        targets=r"(attention|mlp)\..*\.(query|key|value|output|up|down)",
        measure=BITS,
        at_once=1,
        **parts,
    )


@functools.cache
def _pretrain(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return pretrain(ByteModel(), _cut(_read_code()), cross_entropy, steps=_STEPS, seed=seed, batch_size=32)


def _read_code() -> str:
    found = [importlib.util.find_spec(name) for name in _MODULES]
    return "".join(Path(spec.origin).read_text(encoding="utf-8") for spec in found if spec and spec.origin)


def _read_prose() -> str:
    return "".join(text for _, text in sorted(pydoc_data.topics.topics.items()))


def _cut(text: str) -> Examples:
    """Pieces of equal length, and the byte after each of their bytes."""
    data = torch.tensor([b for b in text.encode() if b < _BYTES])
    pieces = data[: (len(data) - 1) // _LENGTH * _LENGTH + 1]
    return {"tokens": pieces[:-1].view(-1, _LENGTH)}, pieces[1:].view(-1, _LENGTH)
