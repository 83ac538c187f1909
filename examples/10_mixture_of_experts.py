"""A mixture of LoRA experts for two tasks that contradict each other, exported with its router.

    python examples/10_mixture_of_experts.py

A small network has learned scikit-learn's handwritten digits; one more input, a flag, was always 0. Then it gets two
tasks at once: with the flag it is to say the digit plus five, modulo ten, and without it still the digit. At each
weight, two experts share the rank of one adapter, and a router decides from the input how much of each is used. The
file has the router; one task alone, which needs no router, is an ordinary adapter and folds into the weights.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, BATCH = 300, 64


def read_digits() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images [n, 64] and labels: 1,200 to learn from, the others to test."""
    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x))
    return (x[order[:1200]], y[order[:1200]]), (x[order[1200:]], y[order[1200:]])


def ask(x: Tensor, y: Tensor, flags: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs [n, 65] with the flag, and the labels that it asks for."""
    return torch.cat([x, flags[:, None].to(x.dtype)], 1), torch.where(flags, (y + 5) % 10, y)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, *, flagged: float) -> None:
    for _ in range(STEPS):
        rows = torch.randint(len(x), (BATCH,))
        inputs, labels = ask(x[rows], y[rows], torch.rand(BATCH) < flagged)
        F.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor, *, flag: bool) -> float:
    inputs, labels = ask(x, y, torch.full((len(x),), flag))
    return float((model(inputs).argmax(-1) == labels).float().mean())


def main() -> None:
    torch.manual_seed(0)
    (x, y), (test_x, test_y) = read_digits()
    model = nn.Sequential(nn.Linear(65, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), x, y, flagged=0)

    mixture = ac.Mixture(experts=2, router="shared")  # one router, at the first weight
    config = ac.AdapterConfig(kind="lora", rank=8, mixture=mixture)
    example = (ask(x[:2], y[:2], torch.tensor([False, True]))[0],)
    adapted = ac.compile_with_adapters(model, example, config=config)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    balance = ac.RouterBalance(adapted, optimizer, weight=0.01)  # its loss is apart from yours
    train(adapted, optimizer, x, y, flagged=0.5)
    balance.detach()

    with tempfile.TemporaryDirectory() as folder:
        report = ac.export_onnx(adapted, Path(folder) / "mixture.onnx", example)
    plain, renamed = (accuracy(adapted, test_x, test_y, flag=flag) for flag in (False, True))
    flags = {name: torch.full((len(test_x),), flag) for name, flag in (("plain", False), ("renamed", True))}
    routing = {
        name: ac.measure_routing(adapted, [ask(test_x, test_y, flag)[0]], lambda model, inputs: model(inputs))
        for name, flag in flags.items()
    }
    say = Console(highlight=False).print
    say(f"digits {plain:.1%}, renamed digits {renamed:.1%}; load-balancing loss {balance.loss['0.weight']:.3f}")
    for name, found in routing.items():
        say(f"share of the first expert, {name}: {found['0.weight'][0]:.0%}")
    say(f"largest error of the file with its router on onnxruntime: {report.max_abs_error:.1e}")

    adapted.fix_routing(routing["renamed"], name="renamed")  # one task only: the mean gates of its inputs
    adapted.use("renamed")
    alone, folded = (accuracy(one, test_x, test_y, flag=True) for one in (adapted, adapted.fold()))
    say(f"renamed digits under fixed gates {alone:.1%}, folded {folded:.1%}")
    assert min(plain, renamed) > 0.85, "both tasks should be learned"
    assert report.max_abs_error < 1e-3, "the file should be right"
    assert abs(alone - folded) < 0.005, "folding must not change the predictions"


if __name__ == "__main__":
    main()
