"""The quality benchmark: every method trains, at equal size; what has been run is not run again; the table is right."""

from __future__ import annotations

import importlib
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_compiler.cli.demo.model import DigitTransformer
from benchmarks.quality_methods import METHODS, get_rates, run_method
from benchmarks.quality_tasks import Task


def make_task() -> Task:
    """A small model without pre-training, and random images."""
    torch.manual_seed(0)
    images, labels = torch.rand(40, 8, 8), torch.randint(10, (40,))
    examples = ({"images": images}, labels)
    model = DigitTransformer(width=16, depth=1, heads=2, hidden=24)
    targets = r"blocks\..*\.(query|key|value|output|up|down)"
    return Task(
        name="random",
        model=model,
        train=examples,
        validation=examples,
        test=examples,
        sites=("blocks.*",),
        targets=targets,
    )


@pytest.mark.slow
def test_every_method_trains_and_ends_with_the_same_rank() -> None:
    task, counts = make_task(), {}
    before = [p.clone() for p in task.model.parameters()]
    for name, method in METHODS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            outcome = run_method(method, task, rank=2, rate=get_rates("digits", method)[0], steps=20, seed=0)
        assert 0 <= outcome.test <= 1
        counts[name] = outcome.parameters
    assert all(torch.equal(p, q) for p, q in zip(task.model.parameters(), before, strict=True))
    size = 2 * (4 * (16 + 16) + 2 * (16 + 24))
    assert {counts[n] for n in ("lora", "rslora", "pissa", "lora_ga", "peft_lora")} == {size}
    assert counts["dora"] == size + 4 * 16 + 24 + 16
    for name in ("adalora", "adalora_grow", "adalora_gradient", "adalora_gradient_grow", "peft_adalora"):
        # 12 triplets, each of 33 or 41 values, wherever they are.
        assert 12 * 33 <= counts[name] <= 12 * 41


def test_results_are_summarized_at_the_best_rate_and_paired_by_seed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    quality: Any = importlib.import_module("benchmarks.quality")
    key = {"task": "digits", "rank": 2, "steps": 150, "parameters": 7, "seconds": 1.0}
    runs = [
        ("lora", 0.1, 0, 0.5, 0.50), ("lora", 0.1, 1, 0.5, 0.60),
        ("lora", 0.2, 0, 0.4, 0.99), ("lora", 0.2, 1, 0.4, 0.99),
        ("dora", 0.1, 0, 0.5, 0.52), ("dora", 0.1, 1, 0.5, 0.64),
    ]  # fmt: skip
    path = tmp_path / "results.jsonl"
    names = ("method", "rate", "seed", "validation", "test")
    lines = [json.dumps({**key, **dict(zip(names, run, strict=True))}) for run in runs]
    path.write_text("\n".join([*lines, lines[0][:20]]))
    results = quality.read_results(path)
    assert len(results) == 6
    lora, dora = quality.summarize(results)
    # The rate that looks better on a seed that the others have not seen is not chosen.
    results.append({**results[0], "rate": 0.3, "seed": 0, "validation": 0.45})
    results.append({**results[0], "rate": 0.3, "seed": 2, "validation": 0.99})
    assert quality.summarize(results)[0].rate == 0.1
    assert (lora.rate, lora.mean, lora.difference) == (0.1, pytest.approx(55), None)
    assert (dora.mean, dora.difference) == (pytest.approx(58), pytest.approx(3))
    assert dora.difference_error == pytest.approx(1)
    quality.show(quality.summarize([result for result in results if result["seed"] == 0]), markdown=True)
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| dora | 0.1 | 7 | 52.0 | +2.0 | 1 |",
        "| lora | 0.1 | 7 | 50.0 |  | 1 |",
    ]
