"""Stop a training by a signal, as a cluster does, and resume it bit for bit in another process.

    python examples/07_resume.py

A network that reads scikit-learn's digits is adapted to rotated ones twice: once without a break in this process, and
once in two further processes. The first gets SIGTERM in the middle of the pruning, finishes the step that it is in,
saves to a folder, and ends; the second knows nothing but that folder. Weights, masks, moments of the optimizer and the
order in which ranks were pruned must then be equal in every bit. The network has dropout, so the state of the random
generator is a part of what is saved, as is that of the scheduler.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, STOP = 120, 31
#: Seconds between two steps of a process that is to be stopped; a larger model needs none.
PACE = 0.03


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    rows = torch.randint(len(x), (64,))
    F.cross_entropy(model(x[rows]), y[rows]).backward()
    optimizer.step()
    optimizer.zero_grad()


def make_base(x: Tensor) -> nn.Module:
    """A network with dropout between its layers."""
    layers = [module for _ in range(3) for module in (nn.LazyLinear(64), nn.ReLU(), nn.Dropout(0.2))]
    base = nn.Sequential(*layers, nn.LazyLinear(10))
    base(x)
    return base


class Run:
    """Everything that a training consists of, made anew from the same base model."""

    def __init__(self, base: nn.Module) -> None:
        config = ac.AdapterConfig(rank=8, alpha=8, trainable=("9.*",))
        self.adapted = ac.compile_with_adapters(base, config=config).train()
        self.optimizer = torch.optim.AdamW(self.adapted.trainable_parameters(), lr=2e-2)
        self.rate = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, 2e-2, STEPS)
        schedule = ac.BudgetSchedule(target_rank=3, total_steps=STEPS, interval=5)
        self.budget = ac.RankBudget(self.adapted, self.optimizer, schedule)

    def train_step(self, x: Tensor, y: Tensor) -> None:
        train_step(self.adapted, self.optimizer, x, y)
        self.rate.step()

    def save(self, folder: Path) -> None:
        ac.save_training_state(folder, self.adapted, self.optimizer, self.budget, rate=self.rate)

    def load(self, folder: Path) -> None:
        ac.load_training_state(folder, self.adapted, self.optimizer, self.budget, rate=self.rate)


class StopSignal:
    """Notes SIGTERM, which may come at any time; the loop looks between two steps."""

    def __init__(self) -> None:
        self.has_come = False
        signal.signal(signal.SIGTERM, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self.has_come = True


def work(folder: Path) -> None:
    """What each process does: begin or resume, train until the end or a signal, save."""
    stop = StopSignal()
    x, y, rotated = read_data()
    base = make_base(x)
    base.load_state_dict(torch.load(folder / "base.pt"))
    torch.manual_seed(1)
    run = Run(base)
    state = folder / "state"
    if state.exists():
        torch.manual_seed(2)  # whatever the state of the generators is here, it is replaced
        run.load(state)
    while run.budget.step < STEPS and not stop.has_come:
        run.train_step(rotated, y)
        print(run.budget.step, flush=True)
        time.sleep(PACE)
    run.save(state)


def run_process(folder: Path, *, stop: int | None = None) -> int:
    """Run a process, send it SIGTERM when it has told of a step, and return the last step that it told of."""
    step = 0
    with subprocess.Popen([sys.executable, __file__, str(folder)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            step = int(line)
            if step == stop:
                process.send_signal(signal.SIGTERM)
    assert process.returncode == 0, f"the process ended with {process.returncode}"
    return step


def find_tensors(state: Any, path: str = "") -> dict[str, Tensor]:
    """Every tensor in nested dicts and lists, by its path."""
    if isinstance(state, Tensor):
        return {path: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, (list, tuple)) else ()
    return {name: tensor for key, value in items for name, tensor in find_tensors(value, f"{path}/{key}").items()}


def read_data() -> tuple[Tensor, Tensor, Tensor]:
    """Images, labels and rotated images."""
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    return x, y, x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1)


def main() -> None:
    torch.manual_seed(0)
    x, y, rotated = read_data()
    base = make_base(x)
    optimizer = torch.optim.AdamW(base.parameters(), lr=3e-3)
    for _ in range(200):
        train_step(base, optimizer, x, y)

    torch.manual_seed(1)
    whole = Run(base)
    while whole.budget.step < STEPS:
        whole.train_step(rotated, y)

    resumed = Run(base)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(base.state_dict(), Path(folder) / "base.pt")
        stopped = run_process(Path(folder), stop=STOP)
        assert STOP <= stopped < STEPS, "the signal should stop the first process before its end"
        ended = run_process(Path(folder))
        resumed.load(Path(folder) / "state")

    Console().print(f"the first process stopped after step {stopped}, the second after step {ended}", highlight=False)
    table = Table("state", "tensors", "equal", title=f"{STEPS} steps in one process, and in two")
    for name in ("adapted", "optimizer", "budget"):
        expected, found = (find_tensors(getattr(run, name).state_dict()) for run in (whole, resumed))
        assert expected.keys() == found.keys()
        equal = sum(torch.equal(expected[key], found[key]) for key in expected)
        table.add_row(name, str(len(expected)), str(equal))
        assert equal == len(expected), f"{name} differs after the resume"
    Console().print(table)
    assert whole.budget.history == resumed.budget.history, "the ranks were pruned in another order"
    with torch.no_grad():
        before, after = (
            (model(rotated).argmax(1) == y).float().mean() for model in (base.eval(), resumed.adapted.eval())
        )
    Console().print(f"triplets: {resumed.budget.live_triplets} at the end, 3 for each weight")
    Console().print(f"accuracy on the rotated digits: {before:.1%} before, {after:.1%} after")
    assert resumed.budget.live_triplets == 3 * len(resumed.adapted.sites)
    assert after > before


if __name__ == "__main__":
    work(Path(sys.argv[1])) if len(sys.argv) > 1 else main()
