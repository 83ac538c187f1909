"""A new task from a few examples, without training: a sum of the adapters of other tasks, found by trying (LoraHub).

    python examples/13_compose_adapters.py

A small network has learned scikit-learn's handwritten digits. It has adapters for images that are moved to the left, to
the right, up and down. Then images come that are moved up and to the left, with five examples of each digit: a search
over the weights of a sum needs only the loss of some calls. The sum is an adapter like the others: it can be used,
saved, folded, or trained further. What it changed in each weight is measured as DoRA's paper does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, BATCH, SHOTS = 250, 64, 5
#: The adapters, and by how many pixels down and to the right their images are moved.
TASKS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
NEW = (-1, -1)


def move(images: Tensor, by: tuple[int, int]) -> Tensor:
    """Images [n, 64], moved with what leaves one side coming back at the other."""
    return images.view(-1, 8, 8).roll(by, (1, 2)).flatten(1)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def train(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, betas=(0.8, 0.9))
    for _ in range(STEPS):
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
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, list(model.parameters()), x[:1000], y[:1000])

    adapted = ac.compile_with_adapters(model, (x[:2],), config=ac.AdapterConfig(rank=4, alpha=16))
    for name, by in TASKS.items():
        adapted.add_adapter(name)
        adapted.use(name)
        train(adapted, list(adapted.trainable_parameters()), move(x[:1000], by), y[:1000])

    rest = slice(1000, None)
    moved, names = move(x[rest], NEW), y[rest]
    few = torch.cat([(names == digit).nonzero().flatten()[:SHOTS] for digit in range(10)])
    others = torch.ones(len(names), dtype=torch.bool).index_fill(0, few, value=False)
    found = ac.find_combination(
        adapted, loss, [(moved[few], names[few])], name="up and left", adapters=list(TASKS), trials=80
    )

    say = Console(highlight=False, soft_wrap=True).print
    say(str(found))
    adapted.use("up and left")
    scores = {"no adapter": accuracy(model, moved[others], names[others])}
    for name in (*TASKS, "up and left"):
        adapted.use(name)
        scores[name] = accuracy(adapted, moved[others], names[others])
    say("accuracy on the new task: " + ", ".join(f"{name} {score:.1%}" for name, score in scores.items()))
    for name, change in ac.measure_weight_changes(adapted).items():
        say(f"{name}: its rows changed by {change.magnitude:.3f} in length and {change.direction:.3f} in direction")
    best = max(score for name, score in scores.items() if name != "up and left")
    assert scores["up and left"] > best + 0.03, "the sum should be better than each adapter alone"


if __name__ == "__main__":
    main()
