"""Draw the blocks and weights of a model and mark the adapted ones; uses matplotlib without a display."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from adapter_compiler.report.model_map import MapBlock, MapWeight, map_model
from adapter_compiler.report.rank_figure import assert_known_format
from adapter_compiler.saving.primitives.files import written_beside

if TYPE_CHECKING:
    from adapter_compiler.model.adapted_model import AdaptedModel

_INK, _MUTED, _LINE, _PAPER = "#1f2933", "#7b8794", "#c5ccd4", "#f5f7fa"
_BLUE, _WHITE = "#1f5fa8", "#ffffff"
#: Sizes in inches.
_CHIP_WIDTH, _CHIP_HEIGHT, _GAP, _TITLE = 1.62, 0.62, 0.12, 0.36
_LABEL_WIDTH = 1.45
_MOST_IN_ROW = 6
#: The largest number of characters; longer texts are cut at the beginning.
_LONGEST_LABEL, _LONGEST_HEADING = 24, 21


@dataclasses.dataclass(frozen=True)
class _Row:
    """Weights of one kind side by side.

    Attributes:
        kind: the label before the row; empty if the row continues the previous one.
        weights: the weights.
    """

    kind: str
    weights: Sequence[MapWeight]


def draw_model(adapted: AdaptedModel, path: str | Path) -> Path:
    """Write a picture of a model's blocks and weights; the path's suffix determines the format (png, svg, pdf).

    Raises:
        ConfigError: the format is unknown.
    """
    path = Path(path)
    assert_known_format(path)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 9}):
        figure = make_figure(map_model(adapted), _summarize(adapted))
        with written_beside(path) as draft:
            figure.savefig(draft, facecolor="white")
    return path


def make_figure(blocks: Sequence[MapBlock], title: str) -> Figure:
    """A figure with one box for each group of equal blocks, from top to bottom in the model's order."""
    rows = [_arrange(block.weights) for block in blocks]
    widest = max((len(row.weights) for own in rows for row in own), default=1)
    width = _LABEL_WIDTH + max(widest, 3) * (_CHIP_WIDTH + _GAP) + 2 * _GAP
    heights = [_TITLE + len(own) * (_CHIP_HEIGHT + _GAP) for own in rows]
    height = 0.95 + sum(heights) + 0.25 * len(blocks)
    figure = Figure(figsize=(width, height), dpi=120)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, width)
    axes.set_ylim(height, 0)
    axes.set_axis_off()
    axes.text(_GAP, 0.3, title, fontsize=11, fontweight="bold", color=_INK, va="center")
    _draw_legend(axes)
    top = 0.85
    for block, own, tall in zip(blocks, rows, heights, strict=True):
        _draw_block(axes, block, own, top, width, tall)
        top += tall + 0.25
    return figure


def _summarize(adapted: AdaptedModel) -> str:
    report = adapted.report()
    return (
        f"{type(adapted.module).__name__}: {len(report.sites)} weights adapted, "
        f"{report.trainable_parameters:,} values trained ({report.trainable_share:.2%})"
    )


def _arrange(weights: Sequence[MapWeight]) -> list[_Row]:
    """Split weights into rows by the kind of their role; a row has at most ``_MOST_IN_ROW`` weights."""
    rows = []
    for kind, group in groupby(weights, key=lambda weight: weight.role.partition(".")[0].replace("_", " ")):
        own = list(group)
        chunks = [own[start : start + _MOST_IN_ROW] for start in range(0, len(own), _MOST_IN_ROW)]
        rows += [_Row(kind if index == 0 else "", chunk) for index, chunk in enumerate(chunks)]
    return rows


def _draw_block(axes: Axes, block: MapBlock, rows: Sequence[_Row], top: float, width: float, height: float) -> None:
    box = FancyBboxPatch(
        (_GAP, top),
        width - 2 * _GAP,
        height,
        boxstyle="round,pad=0,rounding_size=0.08",
        facecolor=_PAPER,
        edgecolor=_LINE,
        linewidth=1,
    )
    axes.add_patch(box)
    axes.text(2 * _GAP, top + _TITLE / 2, block.title, fontweight="bold", color=_INK, va="center", fontsize=9.5)
    for index, row in enumerate(rows):
        y = top + _TITLE + index * (_CHIP_HEIGHT + _GAP)
        axes.text(2 * _GAP, y + _CHIP_HEIGHT / 2, row.kind, color=_MUTED, va="center", fontsize=8.5)
        for column, weight in enumerate(row.weights):
            _draw_weight(axes, weight, _LABEL_WIDTH + column * (_CHIP_WIDTH + _GAP), y)


def _draw_weight(axes: Axes, weight: MapWeight, x: float, y: float) -> None:
    is_adapted = bool(weight.rank)
    _draw_chip(axes, x, y, _CHIP_WIDTH, _CHIP_HEIGHT, is_adapted=is_adapted)
    part = weight.role.partition(".")[2].replace("_", " + ")
    heading = part or weight.label.rpartition(".")[2][-_LONGEST_HEADING:]
    label = weight.label if len(weight.label) <= _LONGEST_LABEL else f"…{weight.label[1 - _LONGEST_LABEL :]}"
    color = _WHITE if is_adapted else _MUTED
    middle, shape = x + _CHIP_WIDTH / 2, " × ".join(map(str, weight.shape))
    detail = f"{shape}   rank {weight.rank}" if is_adapted else shape
    axes.text(middle, y + 0.14, heading, color=color, ha="center", va="center", fontweight="bold", fontsize=8.5)
    axes.text(middle, y + 0.32, label if label != heading else "", color=color, ha="center", va="center", fontsize=7)
    axes.text(middle, y + 0.49, detail, color=color, ha="center", va="center", fontsize=7)


def _draw_chip(axes: Axes, x: float, y: float, width: float, height: float, *, is_adapted: bool) -> None:
    chip = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.06",
        facecolor=_BLUE if is_adapted else _WHITE,
        edgecolor=_BLUE if is_adapted else _LINE,
        linewidth=1,
        linestyle="-" if is_adapted else (0, (3, 2)),
    )
    axes.add_patch(chip)


def _draw_legend(axes: Axes) -> None:
    for index, (text, is_adapted) in enumerate((("adapted", True), ("not adapted", False))):
        x = _GAP + 1.2 * index
        _draw_chip(axes, x, 0.54, 0.24, 0.14, is_adapted=is_adapted)
        axes.text(x + 0.32, 0.61, text, color=_MUTED, va="center", fontsize=8)
