"""The sections of a report; each is empty if there is nothing to show."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Iterator, Sequence
from html import escape

from adapter_compiler.training.run_report.charts import draw_bars, draw_lines, draw_strips, show_number
from adapter_compiler.training.run_report.run_data import Alignment, Exported, Rounding, RunData, SiteData, SizeCurve
from adapter_compiler.training.run_report.words import find_groups, summarize

#: At most so many points of a loss curve; a longer one shows means of equal parts.
_MOST_POINTS = 300


def write_summary(run: RunData) -> str:
    """The summary in words."""
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in summarize(run))


def write_ranks(run: RunData) -> str:
    """Average ranks by block and by role over the maskings."""
    if not run.maskings:
        return ""
    steps = [0, *(masking.step for masking in run.maskings)]
    found = []
    for title, key in (("block", lambda site: site.block), ("role", lambda site: site.role)):
        rows = {name: _trace(run, sites) for name, sites in find_groups(run.sites, key).items()}
        if len(rows) > 1:
            strips = draw_strips(rows, steps, f"Average rank by {title} over steps")
            found.append(f"<h3>By {title}</h3>{strips}")
    note = "<p>Average rank of the weights in each row: a stronger color is a higher one. The last is written out.</p>"
    return note + "".join(found) if found else ""


def write_curves(run: RunData) -> str:
    """The budget and the loss over steps."""
    parts = []
    if run.maskings:
        start = (0.0, float(sum(site.before for site in run.sites)))
        lines = {"live triplets": [start, *((float(m.step), float(m.live)) for m in run.maskings)]}
        if run.unit == "triplets":
            lines["budget"] = [start, *((float(m.step), float(m.budget)) for m in run.maskings)]
        parts.append(draw_lines(lines, x_label="step", description="Live triplets over steps", stepped=True))
    losses = _shrink(run.losses) or [(float(m.step), m.loss) for m in run.maskings if m.loss is not None]
    if len(losses) > 1:
        parts.append(draw_lines({"loss": losses}, x_label="step", description="The loss over steps"))
    return "".join(parts)


def write_spectra(run: RunData) -> str:
    """The singular values of ΔW at each weight."""
    shown = [site for site in run.sites if site.singular_values]
    if not shown:
        return ""
    most = max(site.singular_values[0] for site in shown) or 1.0
    rows = (
        (
            escape(site.name),
            str(site.after),
            draw_bars(site.singular_values, most, site.after, f"Singular values of the update of {site.name}"),
            show_number(site.singular_values[0]),
            f"{_find_effective_rank(site.singular_values):.1f}",
        )
        for site in shown
    )
    note = (
        "<p>The singular values of ΔW, the largest first, on one scale for all weights. The effective rank is "
        "(Σσ²)² / Σσ⁴: if it is far below the rank, a smaller adapter may do.</p>"
    )
    return note + _write_table(("weight", "rank", "singular values", "largest", "effective rank"), rows)


def write_pruning(run: RunData) -> str:
    """What was pruned, when, and by which score."""
    if not run.maskings:
        return ""
    total = sum(sum(site.scores) for site in run.sites)
    kept = [min(site.scores) for site in run.sites if site.scores]
    least = min(kept, default=0.0)
    rows = (
        (
            escape(site.name),
            escape(site.role),
            f"{site.before} → {site.after}",
            _find_last_change(run, site),
            f"{sum(site.scores) / total:.1%}" if total else "–",
            _compare(max(site.pruned_scores, default=None), least),
        )
        for site in run.sites
    )
    note = (
        f"<p>Each masking keeps the triplets with the largest scores ({escape(run.metric)}) over all weights, as many "
        f"as the budget allows, in {run.unit}. A weight keeps its rank if its triplets score higher than those "
        "elsewhere. The last column compares its best pruned triplet with the least score that was kept anywhere: "
        "below 1× it was pruned for its score; above, because of the rank limits or because another one paid more "
        "for its size.</p>"
    )
    heads = ("weight", "role", "rank", "last change", "share of all scores", "best pruned triplet")
    return note + _write_table(heads, rows)


def write_alignment(alignment: Alignment | None) -> str:
    """The alignment of the adapters with the gradients of the weights over steps."""
    measured = [] if alignment is None else [(step, list(found.values())) for step, found in alignment.history if found]
    if alignment is None or not measured:
        return ""
    lines = {
        "mean over the weights": [(float(step), statistics.fmean(values)) for step, values in measured],
        "the least aligned weight": [(float(step), min(values)) for step, values in measured],
    }
    chart = draw_lines(
        lines,
        x_label="step",
        description="Alignment of the adapters with the gradient over steps",
        level=(alignment.threshold, "re-aligned below this"),
    )
    step, last = next((step, found) for step, found in reversed(alignment.history) if found)
    rows = ((escape(name), f"{value:.3f}") for name, value in sorted(last.items(), key=lambda item: item[1])[:10])
    note = (
        "<p>The share of a weight's gradient G that its used triplets can follow, ‖P PᵀG + G QᵀQ‖ / ‖G‖, from 0 to 2, "
        f"before unused triplets were moved. The least aligned weights at step {step}:</p>"
    )
    return chart + note + _write_table(("weight", "alignment"), rows)


def write_sizes(curve: SizeCurve | None) -> str:
    """Score against size."""
    if curve is None:
        return ""
    points = [(point.values, point.score) for point in curve.points]
    chart = draw_lines(
        {"score": points},
        x_label="values in the adapter",
        description="The score against the number of values",
        errors=[point.error for point in curve.points],
        marked=(curve.recommended.values, curve.recommended.score),
        level=(curve.target, "enough"),
    )
    best = curve.recommended
    text = f"The ring is the smallest size that is enough: {best.values:,.0f} values with a score of {best.score:.4g}."
    return f"<p>{text} Bars are standard errors, where they are known.</p>{chart}"


def write_errors(fold: Rounding | None, export: Exported | None) -> str:
    """Rounding errors of folding, and differences of the exported file."""
    parts = []
    if fold is not None:
        worst = sorted(fold.rounding_error.items(), key=lambda item: -item[1])
        largest = f"{worst[0][1]:.2e} at {escape(worst[0][0])}" if worst else "none"
        parts.append(f"<p>Folding W + ΔW into the weights' dtype: largest rounding error {largest}.</p>")
        rows = ((escape(name), f"{error:.2e}") for name, error in worst[:10])
        parts.append(_write_table(("weight", "rounding error"), rows) if worst else "")
    if export is not None:
        parts.append("<p>The exported file on onnxruntime against PyTorch:</p>")
        cells = ((escape(e.case), escape(e.output), f"{e.max_abs:.2e}", f"{e.max_rel:.2e}") for e in export.errors)
        parts.append(_write_table(("input", "output", "largest difference", "relative"), cells))
    return "".join(parts)


def _trace(run: RunData, sites: Sequence[SiteData]) -> list[float]:
    """The average rank of some sites at the start and after each masking."""
    start = statistics.fmean(site.before for site in sites)
    return [start, *(statistics.fmean(m.ranks.get(site.name, 0) for site in sites) for m in run.maskings)]


def _shrink(losses: Sequence[float]) -> list[tuple[float, float]]:
    size = max(1, -(-len(losses) // _MOST_POINTS))
    parts = [(start, losses[start : start + size]) for start in range(0, len(losses), size)]
    return [(float(start + len(part)), statistics.fmean(part)) for start, part in parts]


def _find_effective_rank(values: Sequence[float]) -> float:
    squares = [value**2 for value in values]
    fourth = sum(square**2 for square in squares)
    return sum(squares) ** 2 / fourth if fourth else 0.0


def _find_last_change(run: RunData, site: SiteData) -> str:
    ranks = [(0, site.before), *((m.step, m.ranks.get(site.name, 0)) for m in run.maskings)]
    changes = [now[0] for before, now in itertools.pairwise(ranks) if now[1] != before[1]]
    return f"step {changes[-1]}" if changes else "never"


def _compare(score: float | None, least: float) -> str:
    if score is None:
        return "–"
    return f"{score / least:.2f}×" if least > 0 else f"{score:.2g}"


def _write_table(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> str:
    return f'<div class="scroll"><table>{"".join(_write_rows(heads, rows))}</table></div>'


def _write_rows(heads: Iterable[str], rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    yield "<thead><tr>" + "".join(f"<th>{escape(head)}</th>" for head in heads) + "</tr></thead><tbody>"
    for row in rows:
        yield "<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>"
    yield "</tbody>"
