"""Adapt a trained model to changed data in ten lines, and get a verified ONNX file of it.

    python examples/01_first_adapter.py

A small network has learned scikit-learn's handwritten digits. Then its camera is mounted the other way round: every
image arrives turned by a quarter, and the network is lost. The ten lines between the two comments below put adapters
into it, train and prune them with an ordinary loop, fold them into the weights, and export the result.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

STEPS = 200


def train(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor) -> None:
    for _ in range(STEPS):
        rows = torch.randint(len(images), (64,))
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def measure_accuracy(logits: Tensor, labels: Tensor) -> float:
    return float((logits.argmax(1) == labels).float().mean())


def run_file(path: Path, images: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(np.asarray(logits))


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32) / 16, torch.tensor(digits.target)
    turned = images.rot90(1, (1, 2))

    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 96), nn.ReLU(), nn.Linear(96, 10))
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), images[:1200], labels[:1200])

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"

        # The ten lines.
        example = (turned[:4],)
        config = ac.AdapterConfig(rank=8, alpha=8)
        adapted = ac.compile_with_adapters(model, example, config=config)
        optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
        schedule = ac.BudgetSchedule(target_rank=4, total_steps=STEPS)
        budget = ac.RankBudget(adapted, optimizer, schedule)  # prunes at each optimizer.step()
        train(adapted, optimizer, turned[:1200], labels[:1200])
        adapted.eval()
        merged = adapted.fold()  # an nn.Sequential as before, with other weights
        report = ac.export_onnx(adapted, path, example)  # fails if onnxruntime and PyTorch disagree
        # That is all; the rest measures it on images that no training has seen.

        held_out, expected = turned[1200:], labels[1200:]
        with torch.no_grad():
            accuracy = {
                "before": measure_accuracy(model(held_out), expected),
                "adapted": measure_accuracy(adapted(held_out), expected),
                "folded": measure_accuracy(merged(held_out), expected),
                "onnxruntime": measure_accuracy(run_file(path, held_out), expected),
            }

    print("accuracy on turned digits: " + ", ".join(f"{name} {value:.1%}" for name, value in accuracy.items()))
    print("rank of each weight: " + ", ".join(f"{name} {rank}" for name, rank in budget.ranks().items()))
    print(f"verified on onnxruntime: {', '.join(report.cases)}; largest difference {report.max_abs_error:.1e}")
    assert accuracy["adapted"] > accuracy["before"] + 0.5, "the adapters should learn the turned images"
    assert accuracy["adapted"] == accuracy["folded"] == accuracy["onnxruntime"], "all three must be the same classifier"
    assert type(merged) is nn.Sequential


if __name__ == "__main__":
    main()
