"""Charts as inline SVG, whose colors are variables of the page's style, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 220, 52, 30, 12, 14

#: Points of a line: x and y.
Points = Sequence[tuple[float, float]]


def draw_lines(
    lines: Mapping[str, Points],
    *,
    x_label: str,
    description: str,
    stepped: bool = False,
    errors: Sequence[float | None] = (),
    marked: tuple[float, float] | None = None,
    level: tuple[float, str] | None = None,
) -> str:
    """Lines with a legend.

    Args:
        lines: the points of each line, by name.
        x_label: what x is.
        description: the chart in a sentence, for readers who do not see it.
        stepped: whether values hold until the next point.
        errors: half the height of an error bar at each point of the first line.
        marked: a point with a ring.
        level: a horizontal line, and what it means.
    """
    spread = [error or 0.0 for error in errors]
    first = next(iter(lines.values()))
    ys = [y for points in lines.values() for _, y in points] + ([level[0]] if level else [])
    ys += [y + sign * e for (_, y), e in zip(first, spread, strict=False) for sign in (-1, 1)]
    xs = [x for points in lines.values() for x, _ in points]
    plot = _Plot(low=(min(xs), min(ys)), high=(max(xs), max(ys)))
    parts = [plot.draw_axes(x_label)]
    for number, points in enumerate(lines.values()):
        parts.append(f'<path class="line c{number}" d="{plot.trace(points, stepped=stepped)}"/>')
        if len(points) <= 40 and not stepped:
            parts += [
                f'<circle class="dot c{number}" cx="{plot.x(x):.1f}" cy="{plot.y(y):.1f}" r="3"/>' for x, y in points
            ]
    for (x, y), error in zip(first, spread, strict=False):
        if error:
            parts.append(f'<path class="bar" d="M{plot.x(x):.1f} {plot.y(y - error):.1f}V{plot.y(y + error):.1f}"/>')
    if level is not None:
        at = plot.y(level[0])
        parts.append(f'<path class="level" d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}"/>')
        parts.append(
            f'<text class="note" x="{_WIDTH - _RIGHT}" y="{at - 5:.1f}" text-anchor="end">{escape(level[1])}</text>'
        )
    if marked is not None:
        parts.append(f'<circle class="ring" cx="{plot.x(marked[0]):.1f}" cy="{plot.y(marked[1]):.1f}" r="8"/>')
    names = "".join(f'<span><i class="c{i}"></i>{escape(name)}</span>' for i, name in enumerate(lines))
    return _frame(_WIDTH, _HEIGHT, "".join(parts), description) + f'<p class="legend">{names}</p>'


def draw_strips(rows: Mapping[str, Sequence[float]], steps: Sequence[int], description: str) -> str:
    """Rows of cells, one a step, that are darker for larger values.

    Args:
        rows: the values of each row, by its name.
        steps: the step of each column.
        description: the chart in a sentence.
    """
    label, cell, height = 150, (_WIDTH - 200) / max(1, len(steps)), 20
    most = max((value for values in rows.values() for value in values), default=0) or 1
    parts = []
    for row, (name, values) in enumerate(rows.items()):
        y = 4 + row * (height + 3)
        parts.append(f'<text x="{label - 8}" y="{y + 14}" text-anchor="end">{escape(_shorten(name))}</text>')
        for column, value in enumerate(values):
            title = f"{name}, step {steps[column]}: {value:.2f}"
            parts.append(
                f'<rect class="cell" x="{label + column * cell:.1f}" y="{y}" width="{max(1, cell - 1):.1f}" '
                f'height="{height}" style="--v:{value / most:.3f}"><title>{escape(title)}</title></rect>'
            )
        parts.append(f'<text x="{label + len(values) * cell + 6:.1f}" y="{y + 14}">{values[-1]:.1f}</text>')
    bottom = 4 + len(rows) * (height + 3) + 14
    ends = ((steps[0], label, "start"), (steps[-1], label + len(steps) * cell, "end"))
    parts += [f'<text x="{x:.1f}" y="{bottom}" text-anchor="{anchor}">step {step}</text>' for step, x, anchor in ends]
    return _frame(_WIDTH, bottom + 8, "".join(parts), description)


def draw_bars(values: Sequence[float], most: float, live: int, description: str) -> str:
    """Small bars; those from ``live`` on are faint."""
    width, height = 120, 34
    each = min(12.0, width / max(1, len(values)))
    parts = []
    for i, value in enumerate(values):
        kind, size = "spectrum" if i < live else "spectrum faint", height * value / most
        box = f'x="{i * each:.1f}" y="{height - size:.1f}" width="{max(0.5, each - 1):.1f}" height="{size:.1f}"'
        parts.append(f'<rect class="{kind}" {box}/>')
    return _frame(width, height, "".join(parts), description, small=True)


class _Plot:
    """The area of a chart, from data to pixels."""

    def __init__(self, *, low: tuple[float, float], high: tuple[float, float]) -> None:
        self._low, self._high = low, high

    def x(self, value: float) -> float:
        return _LEFT + self._share(value, 0) * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return _HEIGHT - _BOTTOM - self._share(value, 1) * (_HEIGHT - _BOTTOM - _TOP)

    def trace(self, points: Points, *, stepped: bool) -> str:
        first, *rest = points
        found = [f"M{self.x(first[0]):.1f} {self.y(first[1]):.1f}"]
        for x, y in rest:
            found.append(f"H{self.x(x):.1f}V{self.y(y):.1f}" if stepped else f"L{self.x(x):.1f} {self.y(y):.1f}")
        return "".join(found)

    def draw_axes(self, x_label: str) -> str:
        right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
        lines = [f'<path class="axis" d="M{_LEFT} {_TOP}V{bottom}H{right}"/>']
        for share in (0.0, 0.5, 1.0):
            value = self._low[1] + share * (self._high[1] - self._low[1])
            at = self.y(value)
            lines.append(f'<path class="grid" d="M{_LEFT} {at:.1f}H{right}"/>')
            lines.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{show_number(value)}</text>')
        for value, anchor in ((self._low[0], "start"), (self._high[0], "end")):
            text = show_number(value)
            lines.append(f'<text x="{self.x(value):.1f}" y="{bottom + 18}" text-anchor="{anchor}">{text}</text>')
        middle = (_LEFT + right) / 2
        lines.append(f'<text x="{middle:.1f}" y="{bottom + 18}" text-anchor="middle">{escape(x_label)}</text>')
        return "".join(lines)

    def _share(self, value: float, axis: int) -> float:
        size = self._high[axis] - self._low[axis]
        return (value - self._low[axis]) / size if size else 0.5


def show_number(value: float) -> str:
    """A number in few characters."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _shorten(name: str) -> str:
    return name if len(name) <= 22 else f"…{name[-21:]}"


def _frame(width: float, height: float, inside: str, description: str, *, small: bool = False) -> str:
    kind = "small" if small else "wide"
    return (
        f'<svg class="{kind}" viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(description)}">'
        f"{inside}</svg>"
    )
