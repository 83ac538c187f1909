"""The ranks that a rank budget gave to each weight, as data and as a picture.

The block and the weight are parts of a site's name: the part up to the first number is the block
(``encoder.layers.3``), the rest is the weight (``attention.query``).
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
        path: the file to write; its suffix determines the format (png, svg, pdf). The picture is written to a
            temporary file, which is then renamed.
        initial_triplets: the number of triplets before the first masking (``RankBudget.live_triplets`` before
            training).
        losses: the loss of each optimizer step, from the first to the last.
        title: heading of the picture.

    Returns:
        The path.

    Raises:
        ConfigError: there is no masking in the history, or the format is unknown.
    """
    if not history:
        raise ConfigError(
            "plot_ranks got an empty history, expected at least one masking; train past the schedule's warm-up, and "
            "give the history of the RankBudget of this training"
        )
    # Importing matplotlib takes most of a second, which programs that draw nothing do not need.
    from adapter_compiler.report.rank_figure import assert_known_format, draw_ranks

    path = Path(path)
    assert_known_format(path)
    grid, curve = arrange_ranks(history[-1].ranks), trace_budget(history, initial_triplets)
    figure = draw_ranks(grid, curve, losses, title)
    with written_beside(path) as draft:
        figure.savefig(draft)
    return path


def arrange_ranks(ranks: Mapping[str, int]) -> RankGrid:
    """Sort ranks, given by site name, into a grid; blocks and weights are in the order of their first site."""
    parts = {name: _split_name(name) for name in ranks}
    inside = {name: part for name, part in parts.items() if part is not None}
    blocks = tuple(dict.fromkeys(block for block, _ in inside.values()))
    weights = tuple(dict.fromkeys(weight for _, weight in inside.values()))
    grid = np.full((len(blocks), len(weights)), np.nan)
    for name, (block, weight) in inside.items():
        grid[blocks.index(block), weights.index(weight)] = ranks[name]
    elsewhere = {_shorten(name): rank for name, rank in ranks.items() if parts[name] is None}
    return RankGrid(blocks=blocks, weights=weights, ranks=grid, elsewhere=elsewhere)


def trace_budget(history: Sequence[MaskingRecord], initial_triplets: int | None = None) -> BudgetCurve:
    """The number of triplets that each masking kept, preceded by ``initial_triplets`` at step 0 if it is given."""
    start = [] if initial_triplets is None else [(0, initial_triplets)]
    points = [*start, *((record.step, sum(record.ranks.values())) for record in history)]
    return BudgetCurve(steps=tuple(step for step, _ in points), triplets=tuple(count for _, count in points))


def _split_name(name: str) -> tuple[str, str] | None:
    """The block and the weight of a site's name, or ``None`` for a name without a number."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part.isdigit()), None)
    if first is None:
        return None
    return ".".join(parts[: first + 1]), _shorten(".".join(parts[first + 1 :]))


def _shorten(name: str) -> str:
    return name.removesuffix(".weight")
