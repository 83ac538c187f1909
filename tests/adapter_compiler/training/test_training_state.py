"""A run that stops anywhere resumes bit for bit; a file is complete or absent; what does not fit is refused."""

from __future__ import annotations

import dataclasses
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.training.training_state import TRAINING_FILE
from passes.planning.compact_plan import compact_plan
from tests.adapter_compiler.saving.rewriting import change_header, read_header
from tests.adapter_compiler.saving.same_bits import assert_same_bits


class RowFactored(torch.optim.Optimizer):
    """An optimizer with second moments by row and column, a Python number and a tuple in its state."""

    def __init__(self, params: Any, lr: float = 0.05) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                state["count"] = state.get("count", 0) + 1
                square = p.grad.square() + 1e-12
                beta = group["betas"][1]
                if p.dim() == 2:
                    state["row"] = state.get("row", 0) * beta + square.mean(-1)
                    state["col"] = state.get("col", 0) * beta + square.mean(-2)
                    scale = state["row"][:, None] * state["col"][None] / state["row"].mean()
                else:
                    scale = state["all"] = state.get("all", 0) * beta + square
                p.sub_(group["lr"] * p.grad / (scale.sqrt() + 1e-3) / state["count"] ** 0.5)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "factored": lambda p: RowFactored(p),
}


class Model(nn.Module):
    """Dropout needs random state, batch normalization has buffers, the head is trained fully."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.norm = nn.BatchNorm1d(9)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(9, 7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.drop(torch.tanh(self.norm(self.up(x))))
        y: torch.Tensor = self.head(torch.tanh(self.down(x)))
        return y


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    optimizer: str = "adamw"
    compact: bool = True
    accumulate: int = 1
    scaler: bool = False
    semantics: str = "paper"
    metric: str = "sensitivity"
    allocator: str = "adalora"
    grow: float = 0.0


STEPS = 16


class Run:
    """A training run that counts micro-steps."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(7)
        self.recipe = recipe
        config = ac.AdapterConfig(rank=4, gamma=0.05, trainable=("head*",))
        self.adapted = ac.compile_with_adapters(Model(), (torch.randn(8, 6),), config=config)
        self.optimizer = OPTIMIZERS[recipe.optimizer](self.adapted.trainable_parameters())
        allocation = ac.Allocation(metric=recipe.metric, allocator=recipe.allocator, grow=recipe.grow)
        schedule = ac.BudgetSchedule(
            target_rank=1.5,
            total_steps=STEPS,
            warmup_steps=2,
            final_steps=5,
            interval=2,
            semantics=recipe.semantics,
            compact=recipe.compact,
            allocation=allocation,
        )
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule)
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.others: dict[str, Any] = {"scheduler": self.scheduler}
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if recipe.scaler else None
        if self.scaler is not None:
            self.others["scaler"] = self.scaler
        self.micro = 0

    def advance(self, micro_steps: int) -> None:
        """Take micro-steps; batches depend on the micro-step's number, dropout on the random state."""
        for _ in range(micro_steps):
            generator = torch.Generator().manual_seed(self.micro)
            x, y = torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)
            loss = (self.adapted(x) - y).square().mean() / self.recipe.accumulate
            if self.scaler is not None:
                # sometimes an overflow, which the scaler skips
                loss = loss * (float("inf") if self.micro % 7 == 5 else 1.0)
                loss = self.scaler.scale(loss)
            loss.backward()
            self.micro += 1
            if self.micro % self.recipe.accumulate == 0:
                self.step()

    def step(self) -> None:
        if self.scaler is not None:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()

    def save(self, folder: Path) -> None:
        ac.save_training_state(folder, self.adapted, self.optimizer, self.budget, **self.others)

    def load(self, folder: Path) -> None:
        ac.load_training_state(folder, self.adapted, self.optimizer, self.budget, **self.others)

    def snapshot(self) -> dict[str, Any]:
        return {
            "model": self.adapted.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "budget": self.budget.state_dict(),
            "ranks": [adapter.rank for adapter in self.adapted.plan],
            "random": torch.get_rng_state(),
            "others": {name: other.state_dict() for name, other in self.others.items()},
        }


def check_stops(recipe: Recipe, stops: list[int], folder: Path) -> None:
    """One uninterrupted run saves its state at the stops; a run that resumes from each must end the same."""
    total = STEPS * recipe.accumulate
    whole = Run(recipe)
    done = 0
    for stop in sorted(stops):
        whole.advance(stop - done)
        whole.save(folder / str(stop))
        done = stop
    whole.advance(total - done)
    expected = whole.snapshot()
    for stop in stops:
        again = Run(recipe)
        again.micro = stop
        torch.manual_seed(999)
        again.load(folder / str(stop))
        again.advance(total - stop)
        assert_same_bits(again.snapshot(), expected, f"{recipe} stopped at {stop}")


@pytest.mark.parametrize("stop", [0, 1, 7, 11, 13])
def test_resumes_bit_for_bit(stop: int, tmp_path: Path) -> None:
    check_stops(Recipe(), [stop], tmp_path)


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(optimizer="adafactor", accumulate=3),
        Recipe(optimizer="fused", scaler=True, semantics="peft"),
        Recipe(optimizer="sgd", grow=0.2, compact=False),
        Recipe(optimizer="factored", allocator="redistribute", metric="magnitude"),
    ],
    ids=["accumulation", "scaler", "growth", "redistribute"],
)
def test_resumes_in_other_settings(recipe: Recipe, tmp_path: Path) -> None:
    check_stops(recipe, [5 * recipe.accumulate + 1], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_hundred_random_stops(optimizer: str, tmp_path: Path) -> None:
    """18 stops for each of six optimizers, in every phase and setting."""
    dice = random.Random(optimizer)
    for number in range(6):
        recipe = Recipe(
            optimizer=optimizer,
            compact=dice.random() < 0.7,
            accumulate=dice.choice([1, 1, 2, 3]),
            scaler=dice.random() < 0.5,
            semantics=dice.choice(["paper", "peft"]),
            metric=dice.choice(["sensitivity", "sensitivity", "importance", "magnitude"]),
            allocator=dice.choice(["adalora", "redistribute"]),
            grow=dice.choice([0.0, 0.25]),
        )
        stops = dice.sample(range(STEPS * recipe.accumulate), 3)
        check_stops(recipe, stops, tmp_path / str(number))


def test_the_file_is_safetensors_and_json(tmp_path: Path) -> None:
    run = Run(Recipe())
    run.advance(3)
    run.save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [TRAINING_FILE]
    header = read_header(tmp_path / TRAINING_FILE)
    assert header["kind"] == "training state"
    assert header["state"]["budget"]["step"] == 3


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (Path.unlink, "does not exist; expected a folder that save_training_state wrote"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "cannot be read as a safetensors file"),
        (change_header(lambda h: h.update(version=9)), "version 9, expected 'training state' of version 1"),
        (change_header(lambda h: h["sites"].pop("up.weight")), r"up\.weight is in this model only"),
        (change_header(lambda h: h["sites"]["up.weight"].update(scale=9.0)), r"saved with scale=9\.0, this model has"),
        (change_header(lambda h: h["sites"]["up.weight"].update(rank=9)), "saved with rank=9, this model has rank=4"),
        (change_header(lambda h: h["state"].update(budget=None)), "was saved with no budget, but one was given"),
        (change_header(lambda h: h["state"]["others"].clear()), "the state of 'scheduler' is on one side only"),
        (change_header(lambda h: h["state"]["budget"]["schedule"].update(interval=3)), "interval=3, this budget has"),
        (change_header(lambda h: h["state"]["optimizer"]["param_groups"][0]["params"].pop()), r"groups of \[7\] param"),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(
    damage: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    run = Run(Recipe())
    run.advance(13)
    run.save(tmp_path)
    damage(tmp_path / TRAINING_FILE)
    fresh = Run(Recipe())
    before = fresh.snapshot()
    with pytest.raises(CheckpointError, match=message):
        fresh.load(tmp_path)
    assert_same_bits(fresh.snapshot(), before)


def test_a_state_that_needs_pickle_is_refused(tmp_path: Path) -> None:
    run = Run(Recipe())
    run.advance(1)
    run.optimizer.param_groups[0]["odd"] = object()
    with pytest.raises(CheckpointError, match=r"optimizer\.param_groups\.0\.odd is a object, which cannot be saved"):
        run.save(tmp_path)
    assert not list(tmp_path.iterdir())


_SAVE_FOREVER = """
import sys, torch
from pathlib import Path
sys.path[:0] = {path!r}
from tests.adapter_compiler.training.test_training_state import Recipe, Run
run = Run(Recipe())
while True:
    run.advance(1)
    run.budget.detach() if run.micro == 1 else None
    run.save(Path(sys.argv[1]))
    print(run.micro, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_leaves_a_readable_file(tmp_path: Path) -> None:
    script = _SAVE_FOREVER.format(path=[path for path in sys.path if path] + [os.getcwd()])
    dice = random.Random(0)
    for _ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        assert process.stdout.readline(), "the process saves at least once"
        for _ in range(dice.randrange(10)):
            process.stdout.readline()
        time.sleep(dice.random() / 50)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        Run(Recipe()).load(tmp_path)


class TwoTasks:
    """One adapter is trained and shrunk, then a second one is trained."""

    def __init__(self, *, second: str = "second", config: ac.AdapterConfig | None = None, use: bool = True) -> None:
        torch.manual_seed(7)
        self.adapted = ac.compile_with_adapters(Model(), config=ac.AdapterConfig(rank=4, trainable=("head*",)))
        self.adapted.add_adapter(second, config=config)
        if use:
            self.adapted.use(second)
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=0.01)

    def train_first(self) -> None:
        active = self.adapted.active_adapter
        self.adapted.use("default")
        optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=0.01)
        schedule = ac.BudgetSchedule(target_rank=1, total_steps=6, warmup_steps=1, final_steps=2, compact=True)
        budget = ac.RankBudget(self.adapted, optimizer, schedule)
        self.train(0, 6, optimizer)
        assert sum(budget.ranks().values()) == sum(adapter.rank for adapter in self.adapted.plan)
        self.adapted.use(active)

    def train(self, start: int, end: int, optimizer: torch.optim.Optimizer | None = None) -> None:
        optimizer = optimizer or self.optimizer
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            self.adapted(torch.randn(8, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_inactive_adapters_are_restored_with_their_ranks(tmp_path: Path) -> None:
    whole = TwoTasks()
    whole.train_first()
    whole.train(6, 9)
    ac.save_training_state(tmp_path, whole.adapted, whole.optimizer)
    whole.train(9, 12)
    again = TwoTasks()
    default = dict(again.adapted.parameters_of_adapter("default").named_parameters())
    torch.manual_seed(999)
    ac.load_training_state(tmp_path, again.adapted, again.optimizer)
    again.train(9, 12)
    for run in (whole, again):  # whose outputs are those of the first task
        run.adapted.use("default")
    assert_same_bits(again.adapted.state_dict(), whole.adapted.state_dict())
    assert [one.rank for one in again.adapted.plan] == [one.rank for one in whole.adapted.plan] != [4, 4]
    assert all(default[name] is p for name, p in again.adapted.parameters_of_adapter("default").named_parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: TwoTasks(use=False),
            r"'second' was active when it was saved, 'default' is active in this model.* use\('s",
        ),
        (lambda: TwoTasks(second="other", use=False), r"'second' was active.*call add_adapter and use for 'second'"),
        (lambda: with_third(TwoTasks()), r"'third' is in this model only.*remove it with remove_adapter"),
        (lambda: without_first(TwoTasks()), r"'default' is in the file only.*add it with add_adapter"),
        (lambda: with_first_of_rank(2), r"up\.weight was saved with rank=4, this model has rank=2"),
    ],
)
def test_other_adapters_are_refused_and_nothing_changes(
    other: Callable[[], TwoTasks], message: str, tmp_path: Path
) -> None:
    run = TwoTasks()
    ac.save_training_state(tmp_path, run.adapted, run.optimizer)
    fresh = other()
    before = fresh.adapted.state_dict()
    before = {name: tensor.clone() for name, tensor in before.items()}
    with pytest.raises(CheckpointError, match=message):
        ac.load_training_state(tmp_path, fresh.adapted, fresh.optimizer)
    assert_same_bits(fresh.adapted.state_dict(), before)


def with_third(run: TwoTasks) -> TwoTasks:
    run.adapted.add_adapter("third")
    return run


def without_first(run: TwoTasks) -> TwoTasks:
    run.adapted.remove_adapter("default")
    return run


def with_first_of_rank(rank: int) -> TwoTasks:
    """The same sites and scales, with a first adapter of a smaller rank."""
    run = TwoTasks()
    plan = run.adapted.adapter_set.plans["default"]
    run.adapted.change_ranks("default", compact_plan(plan, {one.site.name: torch.arange(rank) for one in plan}))
    return run


def test_a_load_that_fails_restores_inactive_adapters(tmp_path: Path) -> None:
    run = TwoTasks()
    run.train_first()
    run.train(6, 8)
    ac.save_training_state(tmp_path, run.adapted, run.optimizer, refusing=Refusing())
    fresh = TwoTasks()
    before = {name: tensor.clone() for name, tensor in fresh.adapted.state_dict().items()}
    with pytest.raises(CheckpointError, match="refuses"):
        ac.load_training_state(tmp_path, fresh.adapted, fresh.optimizer, refusing=Refusing())
    assert_same_bits(fresh.adapted.state_dict(), before)
    assert [one.rank for one in fresh.adapted.adapter_set.plans["default"]] == [4, 4]


class Refusing:
    """An object that saves a state and does not load one."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise RuntimeError("it refuses")
