"""Draw how weights changed in length and direction; uses matplotlib without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from adapter_compiler.report.rank_figure import STYLE

#: Colors that differ in lightness too.
_COLORS = ("#1f5fa8", "#d9622b", "#2f9e6e", "#8a4fbf", "#b8860b", "#7b8794")
_MARKERS = ("o", "s", "^", "D", "v", "P")


def draw_changes(points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Figure:
    """A figure with a point (ΔD, ΔM) for each weight, by label."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.6), layout="constrained")
        axes = figure.add_subplot()
        for number, (label, found) in enumerate(points.items()):
            axes.scatter(
                [direction for direction, _ in found],
                [magnitude for _, magnitude in found],
                s=28,
                alpha=0.8,
                linewidths=0,
                color=_COLORS[number % len(_COLORS)],
                marker=_MARKERS[number % len(_MARKERS)],
                label=label,
            )
        axes.set_xlabel("change of direction, ΔD = mean of 1 − cos")
        axes.set_ylabel("change of length, ΔM")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        if title:
            axes.set_title(title)
    return figure
