"""Which models of the zoo end in a verified, merged ONNX file, by which strategy, and why the others do not.

    ./run python benchmarks/onnx_coverage.py --group encoder
    ./run python benchmarks/onnx_coverage.py --output coverage.jsonl --table coverage.md

Each model runs in a process of its own, so that one crash is one row. A row is written as soon as it is known;
a second run with the same --output goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Arguments of transformers models that a deployed file does not take.
FOR_A_LOSS = ("labels", "future_values", "future_observed_mask", "return_loss")

#: What torch.export appends to its reasons.
_NOISE = r" \(unhinted: [^;]*|; torch.export needs control flow that does not depend on tensor values"


def measure(name: str) -> dict[str, Any]:
    """Compile, disturb the adapters, fold, export and verify one entry; what went wrong, at which stage."""
    import torch

    sys.path.insert(0, str(ROOT))
    from tests.zoo import entries
    from tests.zoo.checks import compile_entry, warm_up

    torch.set_num_threads(1)
    (entry,) = entries(names=[name])
    torch.manual_seed(0)
    row: dict[str, Any] = {"name": name, "group": entry.group, "stage": "compile"}
    try:
        model = entry.build().eval()
        warm_up(model, entry)
        adapted = compile_entry(model, entry)
        with torch.no_grad():
            for parameter in adapted.adapters.parameters():
                parameter.normal_(0, 0.1)
        row["stage"] = "export"
        args, kwargs = entry.example()
        report, row["left_out"] = export_as_deployed(adapted, args, kwargs)
        row |= {"stage": "done", "dynamic": report.dynamic, "max_abs_error": report.max_abs_error}
        row |= {"cases": list(report.cases), "not_verified": list(report.not_verified)}
        row |= {"strategy": report.strategy, "frozen": list(report.frozen), "drawing": report.drawing}
    except Exception as error:  # whatever a model of the zoo raises is a row of the table
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:4000]}"
    return row


def export_as_deployed(adapted: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
    """The report of an export, without what only a loss needs where the whole call does not export."""
    import adapter_compiler as ac

    with tempfile.TemporaryDirectory() as folder:
        try:
            return ac.export_onnx(adapted, Path(folder) / "model.onnx", args, kwargs), []
        except ac.AdapterCompilerError as error:
            left_out = [name for name in FOR_A_LOSS if name in kwargs]
            if not left_out:
                raise
            kept = {name: value for name, value in kwargs.items() if name not in left_out}
            try:
                return ac.export_onnx(adapted, Path(folder) / "model.onnx", args, kept), left_out
            except ac.AdapterCompilerError:
                raise error from None


def run_one(name: str, timeout: float) -> dict[str, Any]:
    """`measure` in a process of its own."""
    started = time.monotonic()
    command = [sys.executable, "-W", "ignore", __file__, "--measure", name]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith('{"name"')]
        crash = {"name": name, "stage": "crash", "reason": f"exit {done.returncode}: {done.stderr[-300:]}"}
        row: dict[str, Any] = json.loads(lines[-1]) if lines else crash
    except subprocess.TimeoutExpired:
        row = {"name": name, "stage": "timeout", "reason": f"more than {timeout:.0f} s"}
    return row | {"seconds": round(time.monotonic() - started, 1)}


def read_rows(output: Path) -> dict[str, dict[str, Any]]:
    if not output.exists():
        return {}
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {row["name"]: row for row in rows}


def as_table(rows: list[dict[str, Any]]) -> str:
    """``docs/onnx_coverage.md``."""
    compiled = [row for row in rows if row["stage"] != "compile"]
    done = [row for row in rows if row["stage"] == "done"]
    strategies = collections.Counter(row["strategy"].partition(",")[0] for row in done)
    notes = {
        "with something constant that no verified input has shown to matter": [r for r in done if r.get("frozen")],
        "that draw random numbers": [r for r in done if r.get("drawing")],
        "exported without what only a loss needs": [r for r in done if r.get("left_out")],
    }
    lines = [
        "# ONNX coverage",
        "",
        "Made by `python benchmarks/onnx_coverage.py --output FILE --table docs/onnx_coverage.md`; tiny random models,",
        "see `tests/zoo`. Each is adapted, its adapters are given random values and folded, and the model is exported.",
        "A file counts when it agrees with PyTorch on the example, on other sizes of open dimensions, and on random",
        "inputs. Rows are of several commits: those that failed were measured anew as the exporter changed.",
        "",
        f"{len(done)} of {len(compiled)} models that compile end in a verified file "
        f"({len(done) / max(1, len(compiled)):.1%}); {len(rows) - len(compiled)} do not compile.",
        "",
        *(f"- {count} by {name}" for name, count in strategies.most_common()),
        *(
            f"- {len(found)} {note}: {', '.join(row['name'] for row in found)}"
            for note, found in notes.items()
            if found
        ),
        "",
        "## What has no file, and why",
        "",
        *(line for row in compiled if row not in done for line in _list_reasons(row)),
        "",
        "## Every model",
        "",
        "| model | group | result | strategy | largest error | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{row['max_abs_error']:.1e}" if "max_abs_error" in row else ""
        cells = (row["name"], row.get("group", ""), row["stage"], row.get("strategy", ""), error, row["seconds"])
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def _list_reasons(row: dict[str, Any]) -> Iterator[str]:
    """Why each way failed, those with the same reason together."""
    yield f"- **{row['name']}**"
    ways: dict[str, list[str]] = {}
    for attempt in re.sub(_NOISE, "", row.get("reason", "")).split("; also tried: "):
        way, _, reason = attempt.partition(": ")
        ways.setdefault(reason, []).append(way)
    yield from (f"  - {'; '.join(found)}: {reason}" for reason, found in ways.items())


def choose_names(group: str | None, names: list[str] | None) -> list[str]:
    sys.path.insert(0, str(ROOT))
    from tests.zoo import entries

    return [entry.name for entry in entries(group, names)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", help="models of the zoo; default: all")
    parser.add_argument("--group", help="one group of the zoo")
    parser.add_argument("--output", type=Path, help="JSON lines, one a model; rows that are there are kept")
    parser.add_argument("--table", type=Path, help="write the table as markdown")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a model may take")
    parser.add_argument("--workers", type=int, default=2, help="models at a time")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure)))
        return
    names = choose_names(options.group, options.names)
    known = read_rows(options.output) if options.output else {}
    todo = [name for name in names if name not in known]
    with concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        futures = [pool.submit(run_one, name, options.timeout) for name in todo]
        for position, future in enumerate(concurrent.futures.as_completed(futures), 1):
            row = future.result()
            known[row["name"]] = row
            reason = row.get("reason", "")[:160]
            print(f"{position}/{len(todo)} {row['name']}: {row['stage']} {row['seconds']} s {reason}", flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    table = as_table([known[name] for name in names])
    print(next(line for line in table.splitlines() if "end in a verified file" in line))
    if options.table:
        options.table.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
