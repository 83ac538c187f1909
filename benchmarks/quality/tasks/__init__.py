"""The tasks of the quality benchmark, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.quality.tasks.base import Task
from benchmarks.quality.tasks.characters import make_characters
from benchmarks.quality.tasks.digits import make_coarse, make_convolution, make_digits
from benchmarks.quality.tasks.series import make_series
from benchmarks.quality.tasks.texts import TEXT_TASKS, make_text

#: Tasks that need no files, by name.
SMALL_TASKS: dict[str, Callable[[int, int], Task]] = {
    "digits": make_digits,
    "digits_coarse": make_coarse,
    "convolution": make_convolution,
    "characters": make_characters,
    "series": make_series,
}
#: Optimizer steps where they are not 150.
_STEPS = {"characters": 300, "series": 300}


def make_task(name: str, seed: int, draw: int, *, data: Path | None = None, encoder: Path | None = None) -> Task:
    """The task of this name; the seed draws the pretraining, the draw the examples."""
    if name in SMALL_TASKS:
        return SMALL_TASKS[name](seed, draw)
    if data is None or encoder is None:
        raise SystemExit(f"{name} needs --data and --model")
    return make_text(name, data, encoder, 1000 * draw + seed)


def get_steps(name: str) -> int:
    """How many optimizer steps a task takes."""
    return TEXT_TASKS[name].steps if name in TEXT_TASKS else _STEPS.get(name, 150)
