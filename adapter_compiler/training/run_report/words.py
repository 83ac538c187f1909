"""The summary of a run in words."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from adapter_compiler.training.run_report.charts import show_number
from adapter_compiler.training.run_report.run_data import RunData, SiteData


def summarize(run: RunData) -> Iterator[str]:
    """Sentences: size, progress, where ranks went, and the loss."""
    before, after = (sum(ranks) for ranks in ([s.before for s in run.sites], [s.after for s in run.sites]))
    of = f" of {run.total_steps:,}" if run.total_steps else ""
    yield f"{len(run.sites)} weights have adapters. Step {run.step:,}{of}."
    if run.maskings and before:
        yield (
            f"The budget pruned {before - after} of {before} triplets ({(before - after) / before:.0%}), to an average "
            f"rank of {after / max(1, len(run.sites)):.2f}; {run.parameters:,} values are live. "
            + ("The set of live triplets is fixed." if run.is_frozen else "The set of live triplets may still change.")
        )
    elif run.total_steps:
        yield "Nothing has been pruned yet."
    yield from _describe_extremes(run)
    if len(run.losses) > 1:
        tenth = max(1, len(run.losses) // 10)
        first, last = (statistics.fmean(part) for part in (run.losses[:tenth], run.losses[-tenth:]))
        yield f"The loss went from {show_number(first)} (mean of the first tenth) to {show_number(last)} (of the last)."
    yield from run.notes


def find_groups(sites: Sequence[SiteData], key: Callable[[SiteData], str]) -> dict[str, list[SiteData]]:
    """Sites by block or role, in the order of their first site; what has none is ``elsewhere``."""
    found: dict[str, list[SiteData]] = {}
    for site in sites:
        found.setdefault(key(site) or "elsewhere", []).append(site)
    return found


def _describe_extremes(run: RunData) -> Iterator[str]:
    groups = find_groups(run.sites, lambda site: site.role)
    means = {name: statistics.fmean(site.after for site in sites) for name, sites in groups.items()}
    if len(means) > 1 and max(means.values()) > min(means.values()):
        most, least = max(means, key=means.__getitem__), min(means, key=means.__getitem__)
        yield (
            f"By role, {most} has the highest rank ({means[most]:.1f} on average) and {least} the lowest "
            f"({means[least]:.1f})."
        )
    empty = [site.name for site in run.sites if not site.after]
    if empty:
        shown = ", ".join(empty[:3]) + (f" and {len(empty) - 3} more" if len(empty) > 3 else "")
        yield f"{len(empty)} weights lost all of their rank: {shown}."
