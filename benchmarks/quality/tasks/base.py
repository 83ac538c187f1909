"""What a task is: a pretrained model, examples to adapt it with, and how good it then is."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_compiler.cli.demo.data import LabeledImages

#: Inputs by name, and labels: classes, the next characters, or numbers.
Examples = tuple[dict[str, Tensor], Tensor]

ACCURACY, BITS, ERROR = "accuracy in %", "bits per byte", "error in % of the variance"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One pretraining and one draw of examples.

    Attributes:
        name: as results are filed.
        model: the pretrained model; never changed.
        train: examples to learn from.
        validation: examples to choose a learning rate by.
        test: examples to report.
        sites: globs of the weights that carry adapters.
        targets: the same as a regular expression over modules, for peft.
        measure: :data:`ACCURACY`, of which more is better, :data:`BITS` or :data:`ERROR`, of which less is.
        batch_size: examples a step.
        head: the module that is new and trains fully, if there is one.
        at_once: how many runs one process trains together; 1 for models that draw random numbers, or gain nothing.
    """

    name: str
    model: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    sites: tuple[str, ...]
    targets: str
    measure: str = ACCURACY
    batch_size: int = 32
    head: str | None = None
    at_once: int = 16

    def copy_model(self) -> nn.Module:
        """A model to train, in training mode."""
        return copy.deepcopy(self.model).train()

    def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch: the squared error of numbers, else cross-entropy."""
        return squared_error(outputs, labels) if self.measure == ERROR else cross_entropy(outputs, labels)


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of classes [batch, classes], or of the next character [batch, length, characters]."""
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten())


def squared_error(outputs: Tensor, labels: Tensor) -> Tensor:
    """Of numbers, on average."""
    return (outputs - labels).square().mean()


def draw_batches(examples: Examples, count: int, size: int, seed: int) -> list[Examples]:
    """Batches in an order that is the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    return [take(examples, torch.randint(len(examples[1]), (size,), generator=generator)) for _ in range(count)]


def take(examples: Examples, rows: Tensor) -> Examples:
    """Some of the examples; texts as long as the longest of them."""
    inputs, labels = examples
    taken = {name: value[rows] for name, value in inputs.items()}
    if "attention_mask" in taken:
        length = int(taken["attention_mask"].sum(1).max())
        taken = {name: value[:, :length].contiguous() for name, value in taken.items()}
    return taken, labels[rows]


@torch.no_grad()
def measure(task: Task, model: nn.Module, examples: Examples) -> float:
    """How good a model is on examples, in the unit of ``task.measure``, in eval mode."""
    was_training = model.training
    model.eval()
    total, count = 0.0, 0
    for rows in split_by_length(examples):
        inputs, labels = take(examples, rows)
        outputs = model(**inputs)
        if task.measure == ACCURACY:
            total += 100 * int((outputs.argmax(-1) == labels).sum())
            count += labels.numel()
        else:
            total += float(task.loss(outputs, labels)) * len(rows)
            count += len(rows)
    model.train(was_training)
    value = total / count
    return value / math.log(2) if task.measure == BITS else 100 * value if task.measure == ERROR else value


def split_by_length(examples: Examples) -> tuple[Tensor, ...]:
    """Rows in batches for evaluation, texts of like length together."""
    inputs, labels = examples
    mask = inputs.get("attention_mask")
    order = torch.arange(len(labels)) if mask is None else mask.sum(1).argsort()
    parts: tuple[Tensor, ...] = order.split(128 if mask is None else 32)
    return parts


def pretrain(
    model: nn.Module,
    examples: Examples,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    steps: int,
    seed: int,
    rate: float = 2e-3,
    batch_size: int = 64,
) -> nn.Module:
    """Train all weights; the model in eval mode."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    for inputs, labels in draw_batches(examples, steps, batch_size, 10**6 + seed):
        optimizer.zero_grad()
        loss(model(**inputs), labels).backward()
        optimizer.step()
        scheduler.step()
    return model.eval()


def as_examples(images: LabeledImages) -> Examples:
    """Images as inputs of a model whose argument is ``images``."""
    return {"images": images.images}, images.labels


def draw_splits(examples: Examples, draw: int, size: int) -> tuple[Examples, Examples]:
    """Examples to learn from, and as many others; no two draws share any."""
    first = 2 * size * draw
    return take(examples, torch.arange(first, first + size)), take(
        examples, torch.arange(first + size, first + 2 * size)
    )
