"""``adapter-compiler verify``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from adapter_compiler.commands.output import reported_errors, write_json, write_text


def verify(
    file: Annotated[Path, typer.Argument(help="An ONNX file that this tool exported.")],
    against: Annotated[Path | None, typer.Option(help="Another ONNX file that it should agree with.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random inputs.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the errors as JSON.")] = False,
) -> None:
    """Check an ONNX file on random inputs: by itself, or against another file.

    By itself it must pass onnx.checker, load and run on onnxruntime, and give finite values.

    Example: adapter-compiler verify folded.onnx --against merged.onnx
    """
    from adapter_compiler.onnx.compare_files import verify_file

    with reported_errors(as_json=as_json):
        errors = verify_file(file, against=against, draws=draws)
        if as_json:
            write_json({"file": str(file), "errors": [dataclasses.asdict(error) for error in errors]})
            return
        write_text(f"{file} agrees with {against or 'itself'} on {draws} random inputs")
        table = Table("output")
        for heading in ("max abs error", "max rel error"):
            table.add_column(heading, justify="right")
        for output in dict.fromkeys(error.output for error in errors):
            own = [error for error in errors if error.output == output]
            table.add_row(output, f"{max(e.max_abs for e in own):.1e}", f"{max(e.max_rel for e in own):.1e}")
        write_text(table)
