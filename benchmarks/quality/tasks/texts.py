"""Short texts: a sentence encoder and a new head, which is fitted on the frozen encoder first.

Every method starts from that head and trains it at the same rate, so methods differ in what they do to the encoder
only.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.quality.tasks.base import Examples, Task, split_by_length, take

#: One text or two, and the name of their class.
LabeledText = tuple[tuple[str, ...], str]
_TOKENS = 32
#: Near the best on the validation splits of all the text tasks.
_HEAD_DECAY = 1e-2
#: At most so many texts of a class to choose the learning rate by.
_VALIDATION = 200


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextSource:
    """Where labeled texts come from, and how they are learned.

    Attributes:
        read: texts to learn from, and others to be measured on.
        shots: how many of each class are learned from.
        batch_size: texts a step.
        steps: optimizer steps.
    """

    read: Callable[[Path], tuple[list[LabeledText], list[LabeledText]]]
    shots: int
    batch_size: int = 8
    steps: int = 150


def make_text(name: str, data: Path, encoder: Path, seed: int, *, tests: int = 500) -> Task:
    """Texts of each class to train on, and half as many, within a limit, to choose the rate by."""
    from transformers import AutoModel, AutoTokenizer

    source = TEXT_TASKS[name]
    train, test = source.read(data / name)
    classes = sorted({label for _, label in train})
    generator = torch.Generator().manual_seed(seed)
    order = [train[i] for i in torch.randperm(len(train), generator=generator).tolist()]
    by_class = {label: [row for row in order if row[1] == label] for label in classes}
    tokenizer = AutoTokenizer.from_pretrained(encoder)

    def encode(rows: list[LabeledText]) -> Examples:
        columns = [list(column) for column in zip(*(texts for texts, _ in rows), strict=True)]
        tokens: Any = tokenizer(*columns, padding=True, truncation=True, max_length=_TOKENS, return_tensors="pt")
        inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
        return inputs, torch.tensor([classes.index(label) for _, label in rows])

    shots, extra = source.shots, min(max(1, source.shots // 2), _VALIDATION)
    examples = encode([row for rows in by_class.values() for row in rows[:shots]])
    chosen = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:tests].tolist()
    torch.manual_seed(seed)
    body = AutoModel.from_pretrained(encoder)
    model = TextClassifier(body, body.config.hidden_size, len(classes)).eval()
    _fit_head(model, examples)
    return Task(
        name=name,
        model=model,
        train=examples,
        validation=encode([row for rows in by_class.values() for row in rows[shots : shots + extra]]),
        test=encode([test[i] for i in chosen]),
        sites=("*.layer.*.dense.weight", "*.query.weight", "*.key.weight", "*.value.weight"),
        targets=r"encoder\.encoder\.layer\..*\.(query|key|value|dense)",
        batch_size=source.batch_size,
        head="head",
        at_once=1,
    )


def _fit_head(model: TextClassifier, examples: Examples) -> None:
    """Logistic regression on the features of the frozen encoder.

    The decay is strong enough to leave a loss to learn from: few examples are separated by almost any features, and
    where the head alone does so, the encoder gets no gradient.
    """
    features: list[Tensor] = []
    seen = model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        order = split_by_length(examples)
        for rows in order:
            model(**take(examples, rows)[0])
    seen.remove()
    inputs, labels, head = torch.cat(features), examples[1][torch.cat(order)], model.head
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def evaluate() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(head(inputs), labels) + _HEAD_DECAY * head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(evaluate)
    head.zero_grad()


def _read_banking(folder: Path) -> tuple[list[LabeledText], list[LabeledText]]:
    splits: list[list[LabeledText]] = []
    for split in ("train", "test"):
        with (folder / f"{split}.csv").open(encoding="utf-8", newline="") as file:
            splits.append([((row["text"],), row["category"]) for row in csv.DictReader(file)])
    return splits[0], splits[1]


def _read_clinc(folder: Path) -> tuple[list[LabeledText], list[LabeledText]]:
    splits = json.loads((folder / "data_full.json").read_text(encoding="utf-8"))
    found: list[list[LabeledText]] = [[((text,), label) for text, label in splits[name]] for name in ("train", "test")]
    return found[0], found[1]


def _read_movies(folder: Path) -> tuple[list[LabeledText], list[LabeledText]]:
    """Snippets of reviews that raters found good or bad; those that they were undecided about are left out."""
    lines = (folder / "movieReviewSnippets_GroundTruth.txt").read_text(encoding="utf-8").splitlines()
    rated = [(float(rating), text) for _, rating, text in (line.split("\t", 2) for line in lines)]
    rows: list[LabeledText] = [((text,), "good" if r > 0 else "bad") for r, text in rated if abs(r) >= 0.5]
    return _split(rows)


def _read_med(folder: Path) -> tuple[list[LabeledText], list[LabeledText]]:
    """Pairs of sentences: does the first entail the second?"""
    with (folder / "MED.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    pairs: list[LabeledText] = [((row["sentence1"], row["sentence2"]), row["gold_label"]) for row in rows]
    return _split(pairs)


def _split(rows: list[LabeledText]) -> tuple[list[LabeledText], list[LabeledText]]:
    """One in five by a hash of the text, the same for every seed."""
    held_out = [zlib.crc32("\t".join(texts).encode()) % 5 == 0 for texts, _ in rows]
    train, test = ([r for r, out in zip(rows, held_out, strict=True) if out is wanted] for wanted in (False, True))
    return train, test


#: Tasks that need a data folder and an encoder.
TEXT_TASKS = {
    "banking77": TextSource(read=_read_banking, shots=5),
    "clinc150": TextSource(read=_read_clinc, shots=4),
    "movie_snippets": TextSource(read=_read_movies, shots=200),
    "med": TextSource(read=_read_med, shots=1000, batch_size=16, steps=300),
}
