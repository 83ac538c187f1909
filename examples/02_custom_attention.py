"""Adapt a language model that has no linear layer: raw parameters, a packed projection, tied weights.

    python examples/02_custom_attention.py

Tools that look for `nn.Linear` modules find nothing in this model, and tools that adapt modules one by one would adapt
a shared weight in one place and not in the other. Here sites are found by what the graph does with a weight, so
each of these weights gets one adapter that counts wherever the weight is used:

    table    the embedding of pixel values, and transposed the output layer
    qkv      query, key and value of all heads in one parameter, shared by both blocks
    out      used as x @ W, not x @ W.T
    ff       one matrix up, and the same matrix down

The model reads scikit-learn's handwritten digits pixel by pixel and predicts the next pixel; then black and white swap.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

VALUES, PIXELS, WIDTH, HEADS = 17, 64, 48, 4


class RawAttention(nn.Module):
    """A small causal transformer over pixel values, written with parameters and functions only."""

    def __init__(self) -> None:
        super().__init__()

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape) * shape[-1] ** -0.5)

        self.table = parameter(VALUES, WIDTH)
        self.places = parameter(PIXELS, WIDTH)
        self.qkv = parameter(3 * WIDTH, WIDTH)
        self.out = nn.ParameterList(parameter(WIDTH, WIDTH) for _ in range(2))
        self.ff = nn.ParameterList(parameter(4 * WIDTH, WIDTH) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.table[pixels] + self.places[: pixels.shape[1]]
        for out, ff in zip(self.out, self.ff, strict=True):
            packed = F.linear(F.layer_norm(x, (WIDTH,)), self.qkv).unflatten(-1, (3, HEADS, -1))
            q, k, v = packed.permute(2, 0, 3, 1, 4)
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + mixed.transpose(1, 2).flatten(2) @ out
            x = x + F.gelu(F.linear(F.layer_norm(x, (WIDTH,)), ff)) @ ff
        return F.linear(F.layer_norm(x, (WIDTH,)), self.table)


def loss_of(logits: Tensor, images: Tensor) -> Tensor:
    """Cross-entropy of each image's pixels after the first, in nats."""
    return F.cross_entropy(logits.flatten(0, 1), images[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, steps: int) -> None:
    for _ in range(steps):
        batch = images[torch.randint(len(images), (16,))]
        loss_of(model(batch[:, :-1]), batch).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    torch.manual_seed(0)
    images = torch.tensor(load_digits().data).long()
    model = RawAttention()
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), images[:1500], 250)

    inverted, held_out = 16 - images[:1500], 16 - images[1500:]
    config = ac.AdapterConfig(rank=8, alpha=8, sites=("table", "qkv", "out.*", "ff.*"))
    adapted = ac.compile_with_adapters(model, (inverted[:16, :-1],), config=config)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=4, total_steps=150))
    train(adapted, optimizer, inverted, 150)
    merged = adapted.fold()
    pixels = held_out[:, :-1]
    with torch.no_grad():
        logits = {"before": model(pixels), "adapted": adapted(pixels), "folded": merged(pixels)}
    loss = {name: loss_of(found, held_out).item() for name, found in logits.items()}
    with tempfile.TemporaryDirectory() as folder:
        report = ac.export_onnx(adapted, Path(folder) / "model.onnx", (pixels[:4, :40],))

    adapted.double()  # in float64 no rounding hides a difference between the graph and the folded model
    with torch.no_grad():
        exact, folded = adapted(pixels), adapted.fold()(pixels)
    difference = ((folded - exact).abs().max() / exact.abs().max()).item()

    table = Table("weight", "shape", "rank", title="adapters in a model without linear layers")
    for site in adapted.sites:
        table.add_row(site.name, "×".join(map(str, site.shape)), str(budget.ranks()[site.name]))
    console = Console()
    console.print(table)
    console.print("loss on held-out images: " + ", ".join(f"{name} {value:.3f}" for name, value in loss.items()))
    console.print(
        f"folded against adapted in float64 {difference:.1e}, onnxruntime against PyTorch {report.max_abs_error:.1e}"
    )
    console.print(f"verified on onnxruntime: {', '.join(report.cases)}")

    assert not any(isinstance(module, nn.Linear) for module in model.modules())
    assert len(adapted.sites) == 6, "table, qkv, and out and ff of two blocks"
    assert loss["adapted"] < 0.8 * loss["before"], "the adapters should learn the inverted images"
    assert abs(loss["folded"] - loss["adapted"]) < 1e-5
    assert difference < 1e-12, "folded and adapted must be the same model"


if __name__ == "__main__":
    main()
