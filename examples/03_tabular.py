"""Adapt a tabular network when what its columns mean has changed, prune it, fold it, and run it on onnxruntime.

    python examples/03_tabular.py

The data are real: scikit-learn's breast cancer set gives ten measures of the cell nuclei in 569 samples, each as the
mean over the nuclei and as the mean of the three largest ("worst"). The network learns to diagnose from the ten means:
it takes each as a number and as a category, the quantile that the number is in, which has an embedding. Then the
laboratory reports the ten worst values instead, in the same columns and units. Nobody wants to train and approve a new
network, so the old one gets adapters of rank 6 on all of its weights (``sites="auto"``: embeddings are not adapted by
default), pruned to 2 on average.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, QUANTILES = 300, 8


class TabularNet(nn.Module):
    """Ten measures in, two scores out; embeddings of their quantiles, and residual blocks with batch norm."""

    def __init__(self, edges: Tensor, width: int = 48) -> None:
        super().__init__()
        self.register_buffer("edges", edges)  # between the quantiles of each measure, [10, quantiles - 1]
        self.register_buffer("first", QUANTILES * torch.arange(10))
        self.quantiles = nn.Embedding(10 * QUANTILES, width)
        self.stem = nn.Linear(10, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(3)
        )
        self.head = nn.Linear(width, 2)

    def forward(self, measures: Tensor) -> Tensor:
        codes = (measures.unsqueeze(-1) > self.edges).sum(-1) + self.first
        x = self.stem(measures) + self.quantiles(codes).sum(1)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


def read_data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Means and worst values [569, 10], both in units of the means' spread; labels; which rows are for training."""
    data = load_breast_cancer()
    values = torch.tensor(data.data, dtype=torch.float32)
    means, worst = values[:, :10], values[:, 20:]
    for_training = torch.rand(len(values), generator=torch.Generator().manual_seed(0)) < 0.6
    center, spread = means[for_training].mean(0), means[for_training].std(0)
    return (means - center) / spread, (worst - center) / spread, torch.tensor(data.target), for_training


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    """An ordinary loop: it knows nothing of adapters."""
    model.train()
    for _ in range(STEPS):
        rows = torch.randint(len(x), (64,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def main() -> None:
    torch.manual_seed(0)
    means, worst, y, for_training = read_data()
    held_out = ~for_training

    def accuracy(logits: Tensor) -> float:
        return (logits.argmax(1) == y[held_out]).float().mean().item()

    shares = torch.linspace(0, 1, QUANTILES + 1)[1:-1]
    net = TabularNet(means[for_training].quantile(shares, dim=0).T.contiguous())
    train(net, torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1), means[for_training], y[for_training])

    adapted = ac.compile_with_adapters(net, (means[:4],), config=ac.AdapterConfig(rank=6, alpha=6, sites="auto"))
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=STEPS))
    train(adapted, optimizer, worst[for_training], y[for_training])
    merged = adapted.fold()

    test = worst[held_out]
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        report = ac.export_onnx(adapted, Path(folder) / "tabular.onnx", (test[:4],))
        session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
        on_onnx = torch.from_numpy(np.asarray(session.run(None, {"measures": test.numpy()})[0]))
        results = {
            "means, as trained": accuracy(net(means[held_out])),
            "worst values, not adapted": accuracy(net(test)),
            "worst values, adapted": accuracy(adapted(test)),
            "worst values, folded": accuracy(merged(test)),
            "worst values, onnxruntime": accuracy(on_onnx),
        }
        difference = (on_onnx - adapted(test)).abs().max().item()

    table = Table(title=f"breast cancer, {int(held_out.sum())} samples held out")
    table.add_column("input")
    table.add_column("accuracy", justify="right")
    for name, value in results.items():
        table.add_row(name, f"{value:.1%}")
    Console().print(table)
    ranks = ", ".join(f"{name.removesuffix('.weight')} {rank}" for name, rank in budget.ranks().items())
    Console().print(f"ranks: {ranks}; largest difference between adapted and onnxruntime {difference:.1e}")

    before, after, folded, onnx = list(results.values())[1:]
    assert after > before + 0.05, "the adapters should win back what the change of input has cost"
    assert after == folded == onnx, "adapted, folded and exported must be the same classifier"
    assert "quantiles.weight" in budget.ranks(), "the embeddings have an adapter"
    assert budget.live_triplets == 2 * len(adapted.sites), "the budget is met exactly"


if __name__ == "__main__":
    main()
