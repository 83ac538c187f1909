"""The quality benchmark: every method trains; runs trained together are those trained alone; the table is right."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_compiler.cli.demo.model import DigitTransformer

base: Any = importlib.import_module("benchmarks.quality.tasks.base")
building: Any = importlib.import_module("benchmarks.quality.building")
methods: Any = importlib.import_module("benchmarks.quality.methods")
sizes: Any = importlib.import_module("benchmarks.quality.sizes")
results: Any = importlib.import_module("benchmarks.quality.results")
table: Any = importlib.import_module("benchmarks.quality.table")
tasks: Any = importlib.import_module("benchmarks.quality.tasks")
training: Any = importlib.import_module("benchmarks.quality.training")

TARGETS = r"blocks\..*\.(query|key|value|output|up|down)"


def make_task(seed: int = 0) -> Any:
    """A small model without pre-training, and random images."""
    torch.manual_seed(seed)
    examples = ({"images": torch.rand(40, 8, 8)}, torch.randint(10, (40,)))
    model = DigitTransformer(width=16, depth=1, heads=2, hidden=24)
    parts = {"train": examples, "validation": examples, "test": examples}
    return base.Task(name="random", model=model, sites=("blocks.*",), targets=TARGETS, batch_size=8, **parts)


def build(name: str, count: int, steps: int) -> tuple[list[Any], list[Any], list[Any]]:
    made = [make_task(seed) for seed in range(count)]
    batches = [base.draw_batches(task.train, steps, 8, seed) for seed, task in enumerate(made)]
    method = methods.METHODS[name]
    runs = [
        building.build_run(method, task, own, rank=2, rate=3e-3, seed=seed)
        for seed, (task, own) in enumerate(zip(made, batches, strict=True))
    ]
    return made, batches, runs


@pytest.mark.parametrize(
    "name", ["full", "lora", "dora", "pissa", "adalora", "muon_budget", "triplet", "peft_lora", "peft_adalora"]
)
def test_runs_together_are_runs_alone(name: str) -> None:
    """Ten steps with a budget that prunes, within rounding.

    Outputs are compared, because a parameter without an effect on them, such as the bias of keys, follows rounding.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, batches, together = build(name, 2, 10)
        training.train(made[0], together, batches)
        _, _, alone = build(name, 2, 10)
        for task, run, own in zip(made, alone, batches, strict=True):
            training.train(task, [run], [own])
    for one, other in zip(together, alone, strict=True):
        assert one.count() == other.count()
        images = made[0].test[0]["images"]
        with torch.no_grad():
            torch.testing.assert_close(one.model(images), other.model(images), rtol=1e-3, atol=1e-3)
        pairs = zip(one.model.named_parameters(), other.model.named_parameters(), strict=True)
        for (_, mine), (_, its) in pairs:
            assert mine.requires_grad == its.requires_grad
            if not mine.requires_grad:
                assert torch.equal(mine, its)


@pytest.mark.slow
def test_every_method_trains_and_ends_with_the_same_size() -> None:
    counts = {}
    for name in methods.METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made, batches, runs = build(name, 1, 20)
            before = [p.clone() for p in made[0].model.parameters()]
            training.train(made[0], runs, batches)
        assert all(torch.equal(p, q) for p, q in zip(made[0].model.parameters(), before, strict=True))
        assert 0 <= base.measure(made[0], runs[0].model, made[0].test) <= 100
        counts[name] = runs[0].count()
    size = 2 * (4 * (16 + 16) + 2 * (16 + 24))
    assert {counts[n] for n in ("lora", "rslora", "pissa", "lora_ga", "peft_lora", "muon", "triplet")} == {size}
    assert counts["dora"] == size + 4 * 16 + 24 + 16
    for name in (name for name, method in methods.METHODS.items() if method.surplus > 1):
        # At most 12 triplets, each of 33 or 41 values, wherever they are.
        assert 11 * 33 <= counts[name] <= 12 * 41


@pytest.mark.slow
@pytest.mark.parametrize("name", ["characters", "series", "convolution", "digits_coarse"])
def test_the_small_tasks_are_tasks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("characters", "series", "digits"):
        monkeypatch.setattr(importlib.import_module(f"benchmarks.quality.tasks.{module}"), "_STEPS", 3)
    task = tasks.make_task(name, 0, 1)
    batches = base.draw_batches(task.train, 5, 4, 0)
    run = building.build_run(methods.METHODS["lora"], task, batches, rank=2, rate=1e-3, seed=0)
    assert base.measure(task, run.model, task.validation) >= 0
    before = [p.detach().clone() for p in run.model.parameters() if p.requires_grad]
    training.train(task, [run], [batches])
    after = [p for p in run.model.parameters() if p.requires_grad]
    assert any(not torch.equal(p, q) for p, q in zip(before, after, strict=True))
    other = tasks.make_task(name, 0, 0)
    key = next(iter(task.train[0]))
    assert not torch.equal(task.train[0][key], other.train[0][key])


def test_the_schedule_is_torchs_one_cycle() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, total_steps=150, pct_start=0.1)
    for step in range(150):
        assert training.find_share(step, 150) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-5)
        optimizer.step()
        scheduler.step()


def result(method: str, rate: float, seed: int, draw: int, test: float, measure: str = base.ACCURACY) -> dict[str, Any]:
    keys = {"task": "digits", "rank": 2, "steps": 150, "parameters": 7, "seconds": 1.0, "measure": measure}
    return {**keys, "method": method, "rate": rate, "seed": seed, "draw": draw, "validation": test, "test": test}


def tune(method: str, scores: dict[float, float], measure: str = base.ACCURACY) -> list[dict[str, Any]]:
    return [result(method, rate, 1000, 0, score, measure) for rate, score in scores.items()]


def find(found: list[dict[str, Any]], method: str = "lora", seeds: int = 2, draws: int = 1) -> list[Any]:
    missing: list[Any] = results.find_missing(found, method, tuning=1, seeds=seeds, draws=draws)
    return missing


def test_rates_are_tried_until_the_best_is_inside_and_then_fresh_seeds_run() -> None:
    guess = methods.METHODS["lora"].guess
    first = find([])
    assert [one.rate for one in first] == pytest.approx([guess / 1.6, guess, guess * 1.6])
    assert {one.seed for one in first} == {1000}
    rates = [one.rate for one in first]
    rising = tune("lora", dict(zip(rates, (60.0, 70.0, 80.0), strict=True)))
    (further,) = find(rising)
    assert further.rate == pytest.approx(guess * 1.6**2)
    inside = [*rising, *tune("lora", {further.rate: 75.0})]
    report = find(inside)
    assert [(one.seed, one.rate) for one in report] == [(0, rates[2]), (1, rates[2])]
    done = [*inside, *(result("lora", one.rate, one.seed, 0, 70.0) for one in report)]
    assert find(done) == []
    # The repeat runs at the rate of what it repeats, and tunes nothing.
    assert [(one.seed, one.rate) for one in find(done, "lora_again")] == [(0, rates[2]), (1, rates[2])]
    assert find([], "lora_again") == []


def test_losses_are_better_if_they_are_smaller() -> None:
    found = tune("lora", {0.1: 2.0, 0.16: 1.5, 0.256: 1.8}, base.BITS)
    assert results.find_best_rate(found) == 0.16
    runs = [result("lora", 0.16, seed, 0, 2.0, base.BITS) for seed in (0, 1)]
    runs += [result("muon", 0.16, seed, 0, 1.9, base.BITS) for seed in (0, 1)]
    best, reference = table.summarize([*found, *runs])
    assert (best.method, reference.method) == ("muon", "lora")
    assert best.gain == pytest.approx(5)


def test_differences_are_paired_and_errors_clustered_by_pretraining(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    scores = {"lora": [[50.0, 52.0], [60.0, 62.0]], "dora": [[52.0, 56.0], [61.0, 63.0]]}
    runs = [
        result(name, 0.1, seed, draw, score)
        for name, seeds in scores.items()
        for seed, draws in enumerate(seeds)
        for draw, score in enumerate(draws)
    ]
    results.append_results(path, [*runs, *tune("lora", {0.05: 1.0, 0.1: 2.0, 0.2: 1.0}), *tune("dora", {0.1: 99.0})])
    with path.open("a") as file:
        file.write(json.dumps(runs[0])[:20])
    found = results.read_results(path)
    assert len(found) == 12
    dora, lora = table.summarize(found)
    assert (lora.mean, lora.gain, lora.is_inside) == (56, None, True)
    assert (dora.mean, dora.gain) == (58, 2)
    # The mean differences of the two pretrainings are 3 and 1.
    assert dora.gain_error == pytest.approx(1)
    assert lora.error == pytest.approx(5)
    assert not dora.is_inside
    assert table.write_table(found)[2:] == [
        "| dora | 0.1 (edge) | 7 | 58.0 ± 4.0 | +2.0 ± 1.0 | 52.0 | 4 of 2 |",
        "| lora | 0.1 | 7 | 56.0 ± 5.0 |  | 50.0 | 4 of 2 |",
    ]


def test_the_summary_compares_with_the_best_peer_of_each_task() -> None:
    scores = {"lora": (50.0, 60.0), "dora": (52.0, 61.0), "muon_budget": (55.0, 62.0), "full": (80.0, 80.0)}
    runs = [result(name, 0.1, seed, 0, score) for name, pair in scores.items() for seed, score in enumerate(pair)]
    found = table.compare_with_peers(runs)
    assert (found.peer, found.ours, found.theirs, found.gain, found.gain_error) == ("dora", 58.5, 56.5, 2, 1)
    losses = [dict(run, task="series", measure=base.ERROR, test=run["test"] / 100) for run in runs]
    found = table.compare_with_peers(losses)
    # Of losses the smallest is the best, and the difference is a share of the peer's: 5 / 50 and 2 / 60.
    assert (found.peer, found.gain) == ("lora", pytest.approx(-100 * (5 / 50 + 2 / 60) / 2))
    no_peer = [run for run in runs if run["method"] in ("muon_budget", "full")]
    assert table.compare_with_peers(no_peer) is None
    assert table.write_summary({"digits": runs, "series": losses, "other": no_peer}) == [
        "| task | best peer | peer | muon_budget | better by | full | runs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| digits | dora | 56.5 | 58.5 | +2.0 ± 1.0 points | 80.0 | 2 |",
        "| series | lora | 0.550 | 0.585 | -6.7 ± 3.3 % | 0.800 | 2 |",
    ]


def test_lambda_has_a_rate_of_its_own() -> None:
    _, _, runs = build("adalora_lambda", 1, 20)
    run = runs[0]
    rates = {id(p): group["lr"] for group in run.optimizer.param_groups for p in group["params"]}
    named = {name: rates[id(p)] for name, p in run.model.adapters.named_parameters() if p.requires_grad}
    assert any(name.endswith("lam") for name in named)
    assert named == pytest.approx({name: (8 if name.endswith("lam") else 1) * 3e-3 for name in named})


def test_sizes_are_searched_and_uniform_ranks_are_trained(tmp_path: Path) -> None:
    """Images of four brightnesses; every way counts its steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        labels = torch.arange(40) % 4
        examples = ({"images": (labels / 4).view(-1, 1, 1).expand(40, 8, 8)}, labels)
        task = dataclasses.replace(make_task(), train=examples, validation=examples, test=examples)
        row = sizes.measure_sizes(task, 40, 4, 0, has_dimension=False)
    assert row["full"] > row["base"]
    assert row["uniform steps"] == 6 * 40
    assert row["searched 0.95 steps"] >= 40
    per_rank = 4 * (16 + 16) + 2 * (16 + 24)
    for name in ("searched 0.95", "uniform 0.95"):
        assert math.isnan(row[name]) or 0 < row[name] <= 6 * per_rank
    assert [values for values, _ in row["points"]["uniform"]] == [rank * per_rank for rank in (1, 2, 3, 4, 6)]
    rows = [{"task": "random", "seed": seed, **row, "base": row["base"] + seed} for seed in (0, 1)]
    lines = sizes.write_lines(rows)
    assert any(line.startswith("| uniform 0.95 |") and line.endswith("| 240 |") for line in lines)
    sizes.draw_sizes(rows, tmp_path / "sizes.svg")
    assert (tmp_path / "sizes.svg").read_text(encoding="utf-8").count("random") >= 1


def test_losses_are_scores_below_zero() -> None:
    task = dataclasses.replace(make_task(), measure=base.BITS)
    trainer = sizes._Trainer(task, [], 1)
    assert trainer.score(task.model) == -base.measure(task, task.model, task.test) < 0
