"""Two related tasks that start together: one Q for both from their gradients, a P for each, and alignment over time.

    python examples/12_joint_start.py

A small network has learned scikit-learn's handwritten digits. Two customers send other images, one rotated ones and the
other mirrored ones, of which 150 each are labeled. Both get an adapter. One decomposition of the gradients of both
tasks gives every weight directions that serve both, from which the two adapters start; while they train, each is
re-diagonalized every few steps, and how much of the gradient it can follow is recorded.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

SHOTS, STEPS, BATCH = 150, 150, 32
Batch = tuple[Tensor, Tensor]


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, steps: int) -> None:
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,))
        loss(model, (x[rows], y[rows])).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(-1) == y).float().mean())


def main() -> None:
    torch.manual_seed(0)
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(pixels))
    x, y = torch.tensor(pixels, dtype=torch.float32)[order] / 16, torch.tensor(labels)[order]
    tasks = {
        "rotated": x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1),
        "mirrored": x.view(-1, 8, 8).flip(2).flatten(1),
    }
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, torch.optim.AdamW(model.parameters(), lr=3e-3), x[:1000], y[:1000], 400)

    config = ac.AdapterConfig(rank=4, alpha=16)
    adapted = ac.compile_with_adapters(model, (x[:2],), config=config)
    for name in tasks:
        adapted.add_adapter(name)
    few = slice(1000, 1000 + SHOTS)
    looks = {name: [(images[few], y[few])] for name, images in tasks.items()}
    start = ac.initialize_jointly(adapted, looks, loss)

    say = Console(highlight=False, soft_wrap=True).print
    say(str(start))
    test = slice(1000 + SHOTS, None)
    for name, images in tasks.items():
        adapted.use(name)
        before = accuracy(adapted, images[test], y[test])
        optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2, betas=(0.8, 0.9))
        realigner = ac.Realigner(adapted, optimizer, realign_every=25, batches=looks[name], loss=loss)
        train(adapted, optimizer, images[few], y[few], STEPS)
        realigner.detach()
        after = accuracy(adapted, images[test], y[test])
        aligned = [sum(found.values()) / len(found) for _, found in realigner.history]
        say(
            f"{name}: accuracy {before:.1%} before and {after:.1%} after training; alignment with the gradient "
            f"{aligned[0]:.2f} at step {realigner.history[0][0]}, {aligned[-1]:.2f} at step {realigner.history[-1][0]}"
        )
        assert after > before + 0.3, "the adapter should have learned its task"


if __name__ == "__main__":
    main()
