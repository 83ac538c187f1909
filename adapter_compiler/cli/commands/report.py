"""``adapter-compiler report``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from adapter_compiler.cli.common.output import AsJson, command_output


def report(
    folder: Annotated[Path, typer.Argument(help="A folder of save_training_state, with a budget.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The HTML file to write.")],
    title: Annotated[str | None, typer.Option(help="The heading.")] = None,
    as_json: AsJson = False,
) -> None:
    """Write one HTML file about a training run: ranks, budget, loss and spectra. It needs neither model nor network.

    Example: adapter-compiler report checkpoints/ -o run.html
    """
    from adapter_compiler.training.resuming.read_run import read_run
    from adapter_compiler.training.run_report.page import write_page
    from adapter_compiler.training.run_report.words import summarize

    with command_output(as_json=as_json) as output:
        run = read_run(folder)
        run = run if title is None else dataclasses.replace(run, title=title)
        written = write_page(out, run)
        output.write({"written": str(written), "summary": list(summarize(run))}, *summarize(run), f"wrote {written}")
