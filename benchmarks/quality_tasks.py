"""What the quality benchmark learns: the digits of the demo turned and inverted, or intents of short texts.

Each task has a pretrained model, few examples to train on, as many to choose the learning rate by, and others to be
measured on.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_compiler.demo.data import load_digits, rotate_and_invert
from adapter_compiler.demo.options import DemoOptions
from adapter_compiler.demo.training import pretrain

#: Inputs by name, and labels.
Examples = tuple[dict[str, Tensor], Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """One seed of a task.

    Attributes:
        name: as results call it.
        model: the pretrained model; copies of it are trained.
        train: examples to learn from.
        validation: examples to choose the learning rate by.
        test: examples to report.
        sites: globs of the weights that carry adapters.
        targets: the same as a regular expression over modules, for peft.
        head: the module that is new and trains fully, if there is one.
    """

    name: str
    model: nn.Module
    train: Examples
    validation: Examples
    test: Examples
    sites: tuple[str, ...]
    targets: str
    head: str | None = None

    def copy_model(self) -> nn.Module:
        """A model to train, in training mode."""
        return copy.deepcopy(self.model).train()


def loss(model: nn.Module, batch: Examples) -> Tensor:
    """Cross-entropy of a batch."""
    inputs, labels = batch
    return F.cross_entropy(model(**inputs), labels)


def draw_batches(examples: Examples, count: int, size: int, seed: int) -> list[Examples]:
    """Batches in an order that is the same for every method."""
    generator = torch.Generator().manual_seed(seed)
    return [take(examples, torch.randint(len(examples[1]), (size,), generator=generator)) for _ in range(count)]


def take(examples: Examples, rows: Tensor) -> Examples:
    """Some of the examples."""
    inputs, labels = examples
    return {name: value[rows] for name, value in inputs.items()}, labels[rows]


@torch.no_grad()
def measure_accuracy(model: nn.Module, examples: Examples) -> float:
    """The share of right answers, in eval mode."""
    was_training = model.training
    model.eval()
    rows = torch.arange(len(examples[1])).split(256)
    right = sum(
        int((model(**inputs).argmax(-1) == labels).sum()) for inputs, labels in (take(examples, r) for r in rows)
    )
    model.train(was_training)
    return right / len(examples[1])


def make_digits(seed: int, *, shots: int = 200) -> Task:
    """The demo's vision transformer after pre-training, and digits rotated and inverted."""
    upright, held_out = load_digits(seed)
    model = pretrain(upright, DemoOptions(seed=seed), lambda loss, live: None)
    changed, test = rotate_and_invert(upright), rotate_and_invert(held_out)
    examples: Examples = ({"images": changed.images}, changed.labels)
    return Task(
        name="digits",
        model=model,
        train=take(examples, torch.arange(shots)),
        validation=take(examples, torch.arange(shots, 2 * shots)),
        test=({"images": test.images}, test.labels),
        sites=("blocks.*",),
        targets=r"blocks\..*\.(query|key|value|output|up|down)",
    )


class TextClassifier(nn.Module):
    """A sentence encoder, the mean of its token vectors, and a new head."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits


def make_text(name: str, data: Path, encoder: Path, seed: int, *, shots: int = 10, tests: int = 1000) -> Task:
    """Few-shot intents; ``shots`` of each class to train on, and half as many to choose the rate by."""
    from transformers import AutoModel, AutoTokenizer

    train, test = _READERS[name](data / name)
    classes = sorted({label for _, label in train})
    generator = torch.Generator().manual_seed(seed)
    order = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
    by_class = {label: [row for row in order if row[1] == label] for label in classes}
    tokenizer = AutoTokenizer.from_pretrained(encoder)

    def encode(rows: list[tuple[str, str]]) -> Examples:
        tokens: Any = tokenizer(
            [text for text, _ in rows], padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        )
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return inputs, torch.tensor([classes.index(label) for _, label in rows])

    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:tests].tolist()
    torch.manual_seed(seed)
    body = AutoModel.from_pretrained(encoder)
    return Task(
        name=name,
        model=TextClassifier(body, body.config.hidden_size, len(classes)),
        train=encode([row for rows in by_class.values() for row in rows[:shots]]),
        validation=encode([row for rows in by_class.values() for row in rows[shots : shots + shots // 2]]),
        test=encode([test[i] for i in chosen]),
        sites=("*.layer.*.dense.weight", "*.query.weight", "*.key.weight", "*.value.weight"),
        targets=r"encoder\.encoder\.layer\..*\.(query|key|value|dense)",
        head="head",
    )


def _read_banking(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    splits = []
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            splits.append([(row["text"], row["category"]) for row in csv.DictReader(file)])
    return splits[0], splits[1]


def _read_clinc(folder: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    splits = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    return [tuple(row) for row in splits["train"]], [tuple(row) for row in splits["test"]]


_READERS: dict[str, Callable[[Path], tuple[list[tuple[str, str]], list[tuple[str, str]]]]] = {
    "banking77": _read_banking,
    "clinc150": _read_clinc,
}
#: Tasks that need a data folder and an encoder.
TEXT_TASKS = tuple(_READERS)
