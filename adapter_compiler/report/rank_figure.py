"""Draw ranks by block and weight, and budget and loss over steps; uses matplotlib without a display."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from adapter_compiler.errors import ConfigError
from adapter_compiler.report.rank_grid import BudgetCurve, RankGrid

_INK = "#1f2933"
_MUTED = "#7b8794"
_LINE = "#d5dae0"
_BLUE = "#1f5fa8"
_ORANGE = "#d9622b"
_RANKS = LinearSegmentedColormap.from_list("ranks", ["#f1f4f8", "#a9c8e8", "#3f7fc1", "#123b6d"])
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _LINE,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

#: Heat maps with more cells have a color bar instead of a number in each cell.
_MOST_NUMBERED_CELLS = 400
_RIGHT_WIDTH = 5.4
_RIGHT_HEIGHT = 4.8
_LARGEST = 24.0
#: If there are more weights outside blocks than this, they are drawn as a column instead of a row.
_LONGEST_STRIP = 16


def assert_known_format(path: Path) -> None:
    """Raise :class:`ConfigError` unless matplotlib can write files with this suffix."""
    known = FigureCanvasAgg.get_supported_filetypes()
    if path.suffix.removeprefix(".").lower() not in known:
        raise ConfigError(f"{path}: no picture format {path.suffix!r}; expected one of .{', .'.join(sorted(known))}")


def draw_ranks(grid: RankGrid, curve: BudgetCurve, losses: Sequence[float], title: str) -> Figure:
    """A figure with the ranks on the left, and the budget and the loss over steps on the right.

    Args:
        grid: the ranks.
        curve: the budget over steps.
        losses: the loss of each step; if it is empty, no loss is drawn.
        title: heading of the figure.
    """
    maps = list(_find_maps(grid))
    rows = sum(len(one.rows) for one in maps)
    width = min(max(5.0, 1.8 + 0.85 * max(len(one.columns) for one in maps)), _LARGEST)
    height = min(max(_RIGHT_HEIGHT, 1.1 + 0.7 * len(maps) + (0.5 if rows < 12 else 0.3) * rows), _LARGEST)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width + _RIGHT_WIDTH, height), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        left, right = figure.subfigures(1, 2, squeeze=False, width_ratios=(width, _RIGHT_WIDTH), wspace=0.04)[0]
        _draw_maps(left, maps)
        if height > 1.5 * _RIGHT_HEIGHT:
            right = right.subfigures(2, 1, height_ratios=(_RIGHT_HEIGHT, height - _RIGHT_HEIGHT))[0]
        _draw_steps(right, curve, losses)
    return figure


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Map:
    """One heat map: its heading, the labels of its rows and columns, and its values [rows, columns]."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    ranks: npt.NDArray[np.float64]


def _find_maps(grid: RankGrid) -> Iterator[_Map]:
    """The grid, and a heat map of the weights outside blocks: one row, or one column if there are many."""
    if grid.blocks:
        yield _Map(title="Rank by block and weight", rows=grid.blocks, columns=grid.weights, ranks=grid.ranks)
    if not grid.elsewhere:
        return
    names, ranks = list(grid.elsewhere), np.array(list(grid.elsewhere.values()), dtype=np.float64)
    title = "Rank of the weights outside blocks" if grid.blocks else "Rank by weight"
    if len(names) > _LONGEST_STRIP:
        yield _Map(title=title, rows=names, columns=[""], ranks=ranks[:, None])
    else:
        # Empty cells at the end make the cells as wide as those of the grid.
        strip = np.pad(ranks, (0, max(0, len(grid.weights) - len(ranks))), constant_values=np.nan)
        yield _Map(title=title, rows=[""], columns=names, ranks=strip[None])


def _draw_maps(figure: SubFigure, maps: Sequence[_Map]) -> None:
    heights = [max(2.0, len(one.rows)) if one.rows != [""] else 1.0 for one in maps]
    all_axes = figure.subplots(len(maps), 1, squeeze=False, height_ratios=heights)[:, 0]
    largest = max(1.0, *(float(np.nanmax(one.ranks)) for one in maps))
    for axes, one in zip(all_axes, maps, strict=True):
        _draw_cells(axes, one.ranks, largest)
        axes.set_title(one.title)
        _label(axes, one.rows, one.columns)
    if maps[0].ranks.size > _MOST_NUMBERED_CELLS:
        _add_scale(figure, all_axes[0])


def _add_scale(figure: SubFigure, axes: Axes) -> None:
    scale = figure.colorbar(axes.images[0], ax=axes, shrink=0.5, aspect=30, pad=0.02, anchor=(0, 1))
    scale.ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    scale.ax.spines[:].set_visible(False)


def _draw_cells(axes: Axes, ranks: npt.NDArray[np.float64], largest: float) -> None:
    axes.imshow(ranks, cmap=_RANKS, vmin=0, vmax=largest, aspect="auto")
    rows, columns = ranks.shape
    axes.set_xticks(np.arange(columns + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(rows + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="white", linewidth=2 if rows < 40 else 1)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)
    if ranks.size <= _MOST_NUMBERED_CELLS:
        for (row, column), rank in np.ndenumerate(ranks):
            _write_rank(axes, row, column, float(rank), largest)


def _write_rank(axes: Axes, row: int, column: int, rank: float, largest: float) -> None:
    if np.isnan(rank):
        return
    color = _MUTED if rank == 0 else "white" if rank > 0.55 * largest else _INK
    axes.text(column, row, f"{rank:.0f}", ha="center", va="center", color=color)


def _label(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    axes.set_yticks(range(len(rows)), rows)
    wrapped = [".\n".join(name.rsplit(".", 1)) for name in columns]
    if all(len(line) <= 13 for name in wrapped for line in name.split("\n")):
        axes.set_xticks(range(len(columns)), wrapped)
    else:
        axes.set_xticks(range(len(columns)), columns, rotation=25, ha="right", rotation_mode="anchor")


def _draw_steps(figure: SubFigure, curve: BudgetCurve, losses: Sequence[float]) -> None:
    """Draw the budget as a step function, and the loss below it with the same axis of steps."""
    axes = figure.subplots(2 if losses else 1, 1, sharex=True, squeeze=False)[:, 0]
    last = max(curve.steps[-1], len(losses))
    _draw_budget(axes[0], curve, last)
    if losses:
        _draw_losses(axes[1], losses)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(axis="y", color=_LINE, linewidth=0.6)
        one.tick_params(color=_LINE)
        one.set_axisbelow(True)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].set_xlim(0, last)


def _draw_budget(axes: Axes, curve: BudgetCurve, last: int) -> None:
    steps, triplets = [*curve.steps, last], [*curve.triplets, curve.triplets[-1]]
    axes.step(steps, triplets, where="post", color=_BLUE, linewidth=2)
    axes.fill_between(steps, triplets, step="post", color=_BLUE, alpha=0.08, linewidth=0)
    axes.axvline(curve.steps[-1], color=_MUTED, linewidth=1, linestyle=(0, (3, 3)))
    axes.set_ylim(0, max(triplets) * 1.12)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_title(f"Budget: {triplets[0]} → {triplets[-1]} triplets")
    axes.annotate(
        f"last masking\nat step {curve.steps[-1]}",
        (curve.steps[-1], 0),
        xytext=(-6, 8),
        textcoords="offset points",
        ha="right",
        color=_MUTED,
        fontsize=9,
    )


def _draw_losses(axes: Axes, losses: Sequence[float]) -> None:
    values = np.asarray(losses, dtype=np.float64)
    steps = np.arange(1, len(values) + 1)
    window = max(1, len(values) // 20)
    smooth = np.convolve(values, np.full(window, 1 / window), mode="valid")
    axes.plot(steps, values, color=_ORANGE, linewidth=0.8, alpha=0.35)
    axes.plot(steps[(window - 1) // 2 :][: len(smooth)], smooth, color=_ORANGE, linewidth=2)
    axes.set_ylim(bottom=min(0.0, float(np.nanmin(values))))
    axes.set_title(f"Loss (thick: mean of {window} steps)" if window > 1 else "Loss")
