"""Which models adapter-compiler is right on: the zoo of tests/zoo, each in a process of its own.

    python benchmarks/coverage.py --out coverage.jsonl            # every model; goes on where it stopped
    python benchmarks/coverage.py --names bert,t5 --onnx          # some, with ONNX export
    python benchmarks/coverage.py --every 4 --first 1             # a quarter of them
    python benchmarks/coverage.py --out coverage.jsonl --table docs/coverage.md

For each model: compile; identity before training, and outputs and gradients with a random ΔW against eager code with
effective weights, in eval and in training mode, at two sizes; whether a call in each mode can be captured as one fx
graph with the adapters in it (calls themselves run as Python); the share of the used weights of two or more dimensions
that carry an adapter by default, and that can carry one; six steps of training with pruning, where the budget must be
kept exactly; fold.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tests.zoo import entries  # noqa: E402

CHECKS = (
    "compile",
    "identity_eval",
    "identity_train",
    "outputs_eval",
    "outputs_train",
    "other_size",
    "pruning",
    "fold",
)


def run_in_process(name: str, onnx: bool, timeout: int) -> dict[str, Any]:
    """One model in a process of its own, so that none can disturb another."""
    command = [sys.executable, __file__, "--only", name, *(["--onnx"] if onnx else [])]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, check=False)
    except subprocess.TimeoutExpired:
        return {"name": name, "compile": f"no result within {timeout} s"}
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        return {"name": name, "compile": f"process ended with {done.returncode}: {done.stderr.strip()[-300:]}"}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def run_here(name: str, onnx: bool) -> None:
    """One model; prints its outcome as a line of JSON."""
    import torch

    from tests.zoo.checks import check_entry

    torch.set_num_threads(1)
    (entry,) = entries(names=[name])
    print(json.dumps(dataclasses.asdict(check_entry(entry, onnx=onnx, graphs=True))))


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The outcomes so far, by name."""
    if not path.exists():
        return {}
    return {row["name"]: row for row in map(json.loads, path.read_text(encoding="utf-8").splitlines())}


def summarize(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Totals over some rows, as lines of Markdown."""
    lines = ["| check | models right | of |", "|---|---:|---:|"]
    for check in (*CHECKS, "reach", "onnx"):
        run = [row for row in rows if row.get(check) is not None]
        if run:
            lines.append(f"| {check.replace('_', ', ')} | {sum(row[check] == '' for row in run)} | {len(run)} |")
    for mode in ("eval", "train"):
        lines.append(f"| one graph in {mode} | {sum(bool(r.get(f'whole_{mode}')) for r in rows)} | {len(rows)} |")
    used = sum(row.get("used_weights", 0) for row in rows)
    lines.append(f"| used weights adapted by default | {sum(r.get('adapted_weights', 0) for r in rows)} | {used} |")
    lines.append(f"| used weights reachable | {sum(r.get('reachable_weights', 0) for r in rows)} | {used} |")
    seconds = [row["compile_seconds"] for row in rows if row.get("compile_seconds")]
    if seconds:
        lines += ["", f"Median compile: {statistics.median(seconds):.1f} CPU seconds."]
    return lines


def write_table(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """``docs/coverage.md``."""
    lines = [
        "# Coverage",
        "",
        "Made by `python benchmarks/coverage.py`; tiny random models, see `tests/zoo`. *One graph* says whether",
        "`AdaptedModel.capture` gives a call as one fx graph with its adapters; calls themselves run as Python.",
        "The ONNX column is that of [onnx_coverage.md](onnx_coverage.md).",
        "",
    ]
    for title, chosen in (
        ("Architectures of transformers", [row for row in rows if row.get("group") != "awkward"]),
        ("Awkward modules", [row for row in rows if row.get("group") == "awkward"]),
    ):
        lines += [f"## {title}", "", *summarize(chosen), "", *_table(chosen), ""]
        misses = [f"- **{r['name']}**, {c}: {r[c]}" for r in chosen for c in (*CHECKS, "reach", "onnx") if r.get(c)]
        misses += [f"- **{r['name']}**, not reachable: {text}" for r in chosen for text in r.get("unreachable", [])]
        splits = [f"- **{r['name']}**: {text}" for r in chosen for text in r.get("reasons", [])]
        lines += ["### What misses, and why", "", *(misses or ["Nothing."]), ""]
        lines += ["### Which calls are no graph, and why", "", *(splits or ["None."]), ""]
    path.write_text("\n".join(lines), encoding="utf-8")


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ["model", "group", *(check.replace("_", " ") for check in CHECKS), "graph eval", "graph train", "adapted"]
    heads += ["reachable", "ONNX", "compile s", "all s"]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        marks = [_mark(row.get(check)) for check in CHECKS]
        marks += ["yes" if row.get(f"whole_{mode}") else "no" for mode in ("eval", "train")]
        used = row.get("used_weights", 0)
        marks += [f"{row.get(key, 0)}/{used}" for key in ("adapted_weights", "reachable_weights")]
        marks += [_mark(row.get("onnx"))]
        marks += [f"{row.get(key, 0.0):.1f}" for key in ("compile_seconds", "seconds")]
        lines.append("| " + " | ".join([row["name"], row.get("group", ""), *marks]) + " |")
    return lines


def _mark(value: str | None) -> str:
    return "–" if value is None else "✗" if value else "✓"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON lines to write and to go on from")
    parser.add_argument("--names", help="models, separated by commas (default: all)")
    parser.add_argument("--group", help="models of one group")
    parser.add_argument("--every", type=int, default=1, help="one model of so many")
    parser.add_argument("--first", type=int, default=0, help="where to begin to count")
    parser.add_argument("--onnx", action="store_true", help="export each model, too")
    parser.add_argument("--onnx-from", type=Path, help="take the ONNX column from rows of benchmarks/onnx_coverage.py")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=int, default=600, help="seconds a model may take")
    parser.add_argument("--table", type=Path, help="write Markdown")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        run_here(options.only, options.onnx)
        return
    chosen = entries(options.group, options.names.split(",") if options.names else None)[options.first :: options.every]
    rows = read_rows(options.out) if options.out else {}
    todo = [entry.name for entry in chosen if entry.name not in rows]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        futures = {pool.submit(run_in_process, name, options.onnx, options.timeout): name for name in todo}
        for future in concurrent.futures.as_completed(futures):
            row = future.result()
            rows[row["name"]] = row
            wrong = [f"{check}: {row[check]}" for check in (*CHECKS, "reach", "onnx") if row.get(check)]
            print(
                f"{len(rows):3} {row['name']:32} {row.get('seconds', 0):6.1f} s  {'; '.join(wrong) or 'right'}",
                flush=True,
            )
            if options.out:
                with options.out.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    ordered = [rows[entry.name] for entry in chosen if entry.name in rows]
    exported = read_rows(options.onnx_from) if options.onnx_from else {}
    for row in ordered:
        if row["name"] in exported:
            found = exported[row["name"]]
            row["onnx"] = "" if found["stage"] == "done" else f"{found['stage']}: {found.get('reason', '')[:200]}"
    print("\n".join(summarize(ordered)))
    if options.table:
        write_table(ordered, options.table)
    if any(row.get(check) for row in ordered for check in (*CHECKS, "onnx")):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
