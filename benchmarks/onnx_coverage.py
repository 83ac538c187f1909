"""Which models of the zoo end in a verified, merged ONNX file, by which strategy, and why the others do not.

    ./run python benchmarks/onnx_coverage.py --group encoder
    ./run python benchmarks/onnx_coverage.py --output coverage.jsonl --table coverage.md

Each model runs in a process of its own, so that one crash is one row. A row is written as soon as it is known;
a second run with the same --output goes on where the first one stopped.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Arguments of transformers models that a deployed file does not take.
FOR_A_LOSS = ("labels", "future_values", "future_observed_mask", "return_loss")


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
        row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:1500]}"
    return row


def export_as_deployed(adapted: Any, args: Any, kwargs: Any) -> tuple[Any, list[str]]:
    """The report of an export, without what only a loss needs where the whole call does not export."""
    import adapter_compiler as ac

    with tempfile.TemporaryDirectory() as folder:
        try:
            return ac.export_onnx(adapted, Path(folder) / "model.onnx", args, kwargs), []
        except ac.AdapterCompilerError:
            left_out = [name for name in FOR_A_LOSS if name in kwargs]
            if not left_out:
                raise
        kept = {name: value for name, value in kwargs.items() if name not in left_out}
        return ac.export_onnx(adapted, Path(folder) / "model.onnx", args, kept), left_out


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
    compiled = [row for row in rows if row["stage"] != "compile"]
    done = [row for row in rows if row["stage"] == "done"]
    share = len(done) / max(1, len(compiled))
    lines = [
        f"{len(done)} of {len(compiled)} models that compile end in a verified file ({share:.1%}); "
        f"{len(rows) - len(compiled)} do not compile.",
        "",
        "| model | result | strategy | open dimensions | largest error | seconds | reason |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        error = f"{row['max_abs_error']:.1e}" if "max_abs_error" in row else ""
        reason = row.get("reason", "")[:300].replace("|", "\\|")
        cells = (
            row["name"],
            row["stage"],
            row.get("strategy", ""),
            row.get("dynamic", ""),
            error,
            row["seconds"],
            reason,
        )
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


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
    print(table.split("\n", 1)[0])
    if options.table:
        options.table.write_text(table, encoding="utf-8")


if __name__ == "__main__":
    main()
