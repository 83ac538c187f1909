"""The page: one HTML file with its style and pictures in it, which loads nothing and runs no script."""

from __future__ import annotations

from html import escape
from pathlib import Path

from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.training.run_report.run_data import Extras, RunData
from adapter_compiler.training.run_report.sections import (
    write_alignment,
    write_curves,
    write_errors,
    write_pruning,
    write_ranks,
    write_sizes,
    write_spectra,
    write_summary,
)

_STYLE = """
:root { color-scheme: light dark; --page: #fff; --text: #1d2129; --soft: #667080; --edge: #dfe3e8; --cell: 38 92 178;
  --c0: #265cb2; --c1: #c2571a; --level: #2f8a4c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #14171c; --text: #e6e9ee; --soft: #9aa4b2; --edge: #2d333c; --cell: 110 168 255;
    --c0: #6ea8ff; --c1: #ff9c5b; --level: #63c784; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 56rem; background: var(--page); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1rem 0 .3rem; } p { margin: .4rem 0; }
svg { display: block; } svg.wide { width: 100%; height: auto; } svg.small { width: 120px; height: 34px; }
svg text { fill: var(--soft); font: 12px system-ui, sans-serif; }
.axis, .grid, .bar, .level, .ring, .line { fill: none; } .axis { stroke: var(--soft); } .grid { stroke: var(--edge); }
.line { stroke-width: 2; } .line.c0, .bar, .ring { stroke: var(--c0); }
.line.c1 { stroke: var(--c1); stroke-dasharray: 7 5; }
.ring { stroke-width: 2.5; } .level { stroke: var(--level); stroke-dasharray: 5 4; } .note { fill: var(--level); }
.dot.c0, .spectrum { fill: var(--c0); } .dot.c1 { fill: var(--c1); } .faint { opacity: .3; }
.cell { fill: rgb(var(--cell) / calc(.06 + .94 * var(--v))); }
.legend { color: var(--soft); font-size: .85rem; } .legend span { margin-right: 1rem; white-space: nowrap; }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 2px; }
.legend .c0 { background: var(--c0); } .legend .c1 { background: var(--c1); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem .25rem 0; text-align: left; white-space: nowrap; border-bottom: 1px solid var(--edge); }
th { color: var(--soft); font-weight: 600; }
"""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{sections}
</body>
</html>
"""


def write_page(path: str | Path, run: RunData, extras: Extras | None = None) -> Path:
    """Write the report; an earlier file is replaced only when the new one is complete.

    Args:
        path: the file, which should end in ``.html``.
        run: the run.
        extras: what else to show.

    Returns:
        The path.
    """
    path = Path(path)
    text = render_page(run, extras or Extras())
    with written_beside(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path


def render_page(run: RunData, extras: Extras) -> str:
    """The text of the page."""
    sections = {
        "": write_summary(run),
        "Score against size": write_sizes(extras.curve),
        "Budget and loss": write_curves(run),
        "Ranks over time": write_ranks(run),
        "Alignment with the gradient": write_alignment(extras.alignment),
        "What was pruned, and why": write_pruning(run),
        "Spectra of the updates": write_spectra(run),
        "Folding and export": write_errors(extras.fold, extras.export),
    }
    parts = (
        f"<section>{f'<h2>{name}</h2>' if name else ''}{body}</section>" for name, body in sections.items() if body
    )
    return _PAGE.format(title=escape(run.title), style=_STYLE, sections="\n".join(parts))
