"""Where a rank budget left its triplets, as data and as a picture.

A weight's place is read off its qualified name: what comes before and with the first number is the
block (``encoder.layers.3``), the rest is the weight (``attention.query``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from adapter_compiler.errors import ConfigError
from adapter_compiler.report.rank_grid import BudgetCurve, RankGrid
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.training.budget.masking_record import MaskingRecord


def plot_ranks(
    history: Sequence[MaskingRecord],
    path: str | Path,
    *,
    initial_triplets: int | None = None,
    losses: Sequence[float] = (),
    title: str = "",
) -> Path:
    """Draw the ranks after the last masking, the budget over steps, and the loss if it is given.

    Args:
        history: ``RankBudget.history``.
        path: the file to write; its suffix chooses the format (png, svg, pdf). It is written beside and renamed.
        initial_triplets: triplets before the first masking (``RankBudget.live_triplets`` before training).
        losses: the loss of each optimizer step, first to last.
        title: heading of the picture.

    Returns:
        The path.

    Raises:
        ConfigError: there is no masking in the history, or the format is unknown.
    """
    if not history:
        raise ConfigError(
            "plot_ranks got an empty history, expected at least one masking; train past the schedule's warm-up, and "
            "give the history of the RankBudget that saw the training"
        )
    # matplotlib takes a good part of a second to import, which a program that draws nothing need not wait for.
    from adapter_compiler.report.rank_figure import assert_known_format, draw_ranks

    path = Path(path)
    assert_known_format(path)
    grid, curve = arrange_ranks(history[-1].ranks), trace_budget(history, initial_triplets)
    figure = draw_ranks(grid, curve, losses, title)
    with written_beside(path) as draft:
        figure.savefig(draft)
    return path


def arrange_ranks(ranks: Mapping[str, int]) -> RankGrid:
    """Sort ranks by site name into a grid; blocks and weights stay in the order in which they first come."""
    places = {name: _find_place(name) for name in ranks}
    inside = {name: place for name, place in places.items() if place is not None}
    blocks = tuple(dict.fromkeys(block for block, _ in inside.values()))
    weights = tuple(dict.fromkeys(weight for _, weight in inside.values()))
    grid = np.full((len(blocks), len(weights)), np.nan)
    for name, (block, weight) in inside.items():
        grid[blocks.index(block), weights.index(weight)] = ranks[name]
    elsewhere = {_shorten(name): rank for name, rank in ranks.items() if places[name] is None}
    return RankGrid(blocks=blocks, weights=weights, ranks=grid, elsewhere=elsewhere)


def trace_budget(history: Sequence[MaskingRecord], initial_triplets: int | None = None) -> BudgetCurve:
    """Triplets kept by each masking, after ``initial_triplets`` from step 0 on where that is known."""
    start = [] if initial_triplets is None else [(0, initial_triplets)]
    points = [*start, *((record.step, sum(record.ranks.values())) for record in history)]
    return BudgetCurve(steps=tuple(step for step, _ in points), triplets=tuple(count for _, count in points))


def _find_place(name: str) -> tuple[str, str] | None:
    """``(block, weight)``, or ``None`` for a name without a number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if first is None:
        return None
    return ".".join(parts[: first + 1]), _shorten(".".join(parts[first + 1 :]))


def _shorten(name: str) -> str:
    return name.removesuffix(".weight")
