"""Small models of kinds that are no transformers: experts, tables, graphs, images, pairs."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.awkward_base import (
    HIDDEN,
    TOKENS,
    WIDTH,
    describe_awkward,
    images,
    make_mlp,
    make_weight,
    rows,
    sequences,
    two_rows,
)


class RoutedExperts(nn.Module):
    """Tokens are gathered for each expert by index and added back: shapes depend on the router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4, bias=False)
        self.experts = nn.ModuleList([make_mlp() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        weights, chosen = self.router(flat).softmax(-1).topk(2, dim=-1)
        mixed = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == index)
            picked = flat.index_select(0, token)
            mixed = mixed.index_add(0, token, expert(picked) * weights[token, slot].unsqueeze(1))
        return mixed.view_as(x)


class LowRankBranch(nn.Module):
    """A frozen layer that already has a low-rank branch beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, HIDDEN).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, HIDDEN, bias=False)
        self.head = nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.base(x) + 2.0 * self.up(F.dropout(self.down(x), 0.1, self.training)))


class ResidualMlp(nn.Module):
    """Residual blocks with layer norm, of one width."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.LayerNorm(WIDTH), make_mlp()) for _ in range(3)])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Mixer(nn.Module):
    """MLP-Mixer: linear layers over channels and, on the transposed tensor, over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.positions = nn.Sequential(nn.Linear(16, HIDDEN), nn.GELU(), nn.Linear(HIDDEN, 16))
        self.channels, self.norm = make_mlp(), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Any:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.positions(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return (x + self.channels(self.norm(x))).mean(1)


class FeatureTokens(nn.Module):
    """FT-Transformer: every number gets a weight of its own to become a token, categories get tables."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.bias = make_weight(8, WIDTH), nn.Parameter(torch.zeros(8, WIDTH))
        self.categories = nn.ModuleList([nn.Embedding(size, WIDTH) for size in (3, 5)])
        self.first = nn.Parameter(torch.randn(WIDTH))
        self.mix = nn.TransformerEncoderLayer(WIDTH, 2, dim_feedforward=HIDDEN, batch_first=True, norm_first=True)
        self.head = nn.Linear(WIDTH, 8)

    def forward(self, numbers: Tensor, categories: Tensor) -> Any:
        columns = [table(categories[:, i]) for i, table in enumerate(self.categories)]
        features = [numbers.unsqueeze(2) * self.numbers + self.bias, torch.stack(columns, dim=1)]
        tokens = torch.cat([self.first.expand(numbers.shape[0], 1, -1), *features], dim=1)
        return self.head(self.mix(tokens)[:, 0])


class ClickModel(nn.Module):
    """DLRM: embedding bags with offsets, pairwise products, two MLPs."""

    def __init__(self) -> None:
        super().__init__()
        self.bags = nn.ModuleList([nn.EmbeddingBag(TOKENS, 8, mode="sum") for _ in range(2)])
        self.bottom, self.top = make_mlp(8), nn.Sequential(nn.Linear(8 + 3, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))

    def forward(self, dense: Tensor, ids: Tensor, offsets: Tensor) -> Any:
        dense = self.bottom(dense)
        parts = torch.stack([dense, *(bag(ids, offsets) for bag in self.bags)], dim=1)
        row, column = torch.tril_indices(3, 3, offset=-1)
        return self.top(torch.cat([dense, (parts @ parts.transpose(1, 2))[:, row, column]], dim=1))


class GraphConvolution(nn.Module):
    """Nodes average their neighbors by a dense adjacency matrix; messages are also scattered by edges."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.edge, self.head = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, nodes: Tensor, adjacency: Tensor, edges: Tensor) -> Any:
        hidden = (adjacency @ self.dense(nodes) / adjacency.sum(1, keepdim=True)).relu()
        messages = self.edge(hidden[edges[0]])
        return self.head(hidden.index_add(0, edges[1], messages))


class Unet(nn.Module):
    """A U-Net: strided and transposed convolutions with skips joined by concatenation, and a time embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, WIDTH, 3, stride=2, padding=1)
        self.middle, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.GroupNorm(4, WIDTH)
        self.up, self.leave = nn.ConvTranspose2d(WIDTH, 8, 2, stride=2), nn.Conv2d(16, 3, 1)
        self.time = nn.Sequential(nn.Linear(8, HIDDEN), nn.SiLU(), nn.Linear(HIDDEN, WIDTH))

    def forward(self, x: Tensor, step: Tensor) -> Any:
        angles = step.unsqueeze(1) * torch.logspace(0, -3, 4)
        shift = self.time(torch.cat([angles.sin(), angles.cos()], dim=1))
        skip = self.enter(x).relu()
        low = F.silu(self.norm(self.middle(self.down(skip).relu())) + shift[:, :, None, None])
        return self.leave(torch.cat([self.up(low), skip], dim=1))


class Siamese(nn.Module):
    """Two inputs through one network, compared by cosine with a learned temperature and a contrastive loss."""

    def __init__(self) -> None:
        super().__init__()
        self.tower, self.scale = make_mlp(), nn.Parameter(torch.tensor(2.0))

    def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
        left, right = F.normalize(self.tower(left), dim=-1), F.normalize(self.tower(right), dim=-1)
        scores = self.scale.exp() * left @ right.t()
        target = torch.arange(left.shape[0])
        return {"loss": F.cross_entropy(scores, target) + F.cross_entropy(scores.t(), target), "scores": scores}


class ContinuousDepth(nn.Module):
    """A neural ODE with fixed steps: one block is used eight times, with the time as an input."""

    def __init__(self) -> None:
        super().__init__()
        self.slope, self.head = nn.Linear(WIDTH + 1, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        for step in range(8):
            time = x.new_full((x.shape[0], 1), step / 8)
            x = x + self.slope(torch.cat([x, time], dim=1)).tanh() / 8
        return self.head(x)


class PointNet(nn.Module):
    """Unordered points: a shared linear layer, a maximum, and a learned transform of the input."""

    def __init__(self) -> None:
        super().__init__()
        self.align, self.lift, self.head = make_mlp(WIDTH * WIDTH), make_mlp(HIDDEN), nn.Linear(HIDDEN, 8)

    def forward(self, points: Tensor) -> Any:
        transform = self.align(points).amax(1).view(-1, WIDTH, WIDTH) + torch.eye(WIDTH)
        return self.head(self.lift(points @ transform).amax(1))


class VectorQuantized(nn.Module):
    """The nearest vector of a codebook replaces each hidden state, with a straight-through gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode, self.codes = make_mlp(), make_mlp(), nn.Embedding(TOKENS, WIDTH)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.encode(x)
        nearest = torch.cdist(hidden, self.codes.weight.unsqueeze(0)).argmin(-1)
        quantized = self.codes(nearest)
        commitment = F.mse_loss(hidden, quantized.detach()) + F.mse_loss(quantized, hidden.detach())
        decoded = self.decode(hidden + (quantized - hidden).detach())
        return {"loss": F.mse_loss(decoded, x) + commitment, "decoded": decoded, "codes": nearest}


def numbers_and_categories(batch: int, length: int) -> tuple[Any, ...]:
    """Eight numbers and two categories a row."""
    return torch.randn(batch, 8), torch.randint(0, 3, (batch, 2))


def clicks(batch: int, length: int) -> tuple[Any, ...]:
    """Dense features, and ids in bags of two."""
    return torch.randn(batch, WIDTH), torch.randint(0, TOKENS, (2 * batch,)), torch.arange(batch) * 2


def graphs(batch: int, length: int) -> tuple[Any, ...]:
    """A graph of as many nodes as the length says: features, adjacency, edges (2, 2 × length)."""
    adjacency = torch.eye(length) + (torch.rand(length, length) > 0.5)
    return torch.randn(length, WIDTH), adjacency, torch.randint(0, length, (2, 2 * length))


def images_and_steps(batch: int, length: int) -> tuple[Any, ...]:
    """Images, and the step of the diffusion that each is at."""
    return torch.randn(batch, 3, 16, 16), torch.randint(0, 100, (batch,))


MODELS = (
    describe_awkward("routed-experts", RoutedExperts, sequences, "experts", "data-dependent"),
    describe_awkward("low-rank-branch", LowRankBranch, rows, "no-gradient"),
    describe_awkward("residual-mlp", ResidualMlp),
    describe_awkward("mixer", Mixer, images, "shared-layers"),
    describe_awkward("feature-tokens", FeatureTokens, numbers_and_categories, "packed-qkv"),
    describe_awkward("click-model", ClickModel, clicks),
    describe_awkward("graph-convolution", GraphConvolution, graphs),
    describe_awkward("unet", Unet, images_and_steps, "convolution"),
    describe_awkward("siamese", Siamese, two_rows, "shared-layers"),
    describe_awkward("continuous-depth", ContinuousDepth, rows, "shared-layers"),
    describe_awkward("pointnet", PointNet, sequences),
    describe_awkward("vector-quantized", VectorQuantized, sequences),
)
