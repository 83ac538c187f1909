"""A small vision transformer for 8 × 8 images in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn


def split_into_patches(images: torch.Tensor) -> torch.Tensor:
    """Split images [batch, 8, 8] into patches of 2 × 2 pixels, row by row: [batch, 16, 4]."""
    patches: torch.Tensor = images.unflatten(2, (4, 2)).unflatten(1, (4, 2)).transpose(2, 3)
    return patches.flatten(3).flatten(1, 2)


class Attention(nn.Module):
    """Self-attention with separate weights for queries, keys, values and the output."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.output = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        query, key, value = (self._split(project(x)) for project in (self.query, self.key, self.value))
        mixed = F.scaled_dot_product_attention(query, key, value)
        y: torch.Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return y

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        heads: torch.Tensor = x.unflatten(2, (self.heads, -1))
        return heads.transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers with a GELU between them."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        y: torch.Tensor = self.down(F.gelu(self.up(x)))
        return y


class Block(nn.Module):
    """Attention, then feed-forward, each with a layer normalization before it and a residual connection."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, tokens, width] to the same shape."""
        x = x + self.attention(self.attention_norm(x))
        y: torch.Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class DigitTransformer(nn.Module):
    """A classifier of images [batch, 8, 8] with values from 0 to 1; gives logits [batch, 10]."""

    def __init__(self, *, width: int = 64, depth: int = 4, heads: int = 4, hidden: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.ModuleList(Block(width, heads, hidden) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits of the ten classes."""
        x = self.embedding(split_into_patches(images)) + self.position
        for block in self.blocks:
            x = block(x)
        logits: torch.Tensor = self.head(self.norm(x).mean(dim=1))
        return logits
