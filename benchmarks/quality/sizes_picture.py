"""Draw how much of the gain of full fine-tuning adapters of each size keep, and random subspaces beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adapter_compiler.report.rank_figure import STYLE

#: What is drawn: its name in the results, in the legend, its color and its marker.
_WAYS = (
    ("searched", "find_smallest: cut from rank 8", "#1f5fa8", "o"),
    ("uniform", "uniform ranks, trained from the start", "#d9622b", "s"),
    ("subspace", "random subspaces (d90)", "#2f9e6e", "^"),
)


def draw_sizes(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Write a figure with a panel for each task, from the lines of ``benchmarks.quality.sizes``."""
    tasks = list(dict.fromkeys(row["task"] for row in results))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.6 * len(tasks) + 0.6, 3.9), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False, sharey=True)[0]
        for axes, task in zip(panels, tasks, strict=True):
            _draw_task(axes, [row for row in results if row["task"] == task])
            axes.set_title(task)
        panels[0].set_ylabel("share of full fine-tuning's gain")
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(_WAYS), frameon=False)
        figure.savefig(path)


def _draw_task(axes: Axes, rows: Sequence[dict[str, Any]]) -> None:
    for name, label, color, marker in _WAYS:
        found = sorted(
            (values, (score - row["base"]) / (row["full"] - row["base"]))
            for row in rows
            for values, score in row["points"][name]
        )
        line = "-" if len(rows) == 1 else ""
        axes.plot(*zip(*found, strict=True) if found else ([], []), line, color=color, marker=marker, ms=4, label=label)
    for share in (0.9, 0.95):
        axes.axhline(share, color="#7b8794", lw=0.6, ls=":")
    axes.set_xscale("log")
    axes.set_ylim(-0.05, 1.25)
    axes.set_xlabel("values, or dimensions")
    axes.spines[["top", "right"]].set_visible(False)
