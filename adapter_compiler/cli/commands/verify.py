"""``adapter-compiler verify``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from adapter_compiler.cli.commands.output import reported_errors, write_json, write_text
from adapter_compiler.cli.commands.target import load_target, with_adapters

if TYPE_CHECKING:
    from adapter_compiler.onnx.verification.report import OutputError
    from adapter_compiler.onnx.verify_model import FileVerification


def verify(
    file: Annotated[Path, typer.Argument(help="An ONNX file that this tool exported.")],
    against: Annotated[Path | None, typer.Option(help="Another ONNX file that it should agree with.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help="The PyTorch model it should be: FILE.py:FUNCTION or MODULE:FUNCTION, as for export."),
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="With --model: folder of trained adapters to load.")] = None,
    draws: Annotated[int, typer.Option(min=1, help="Random inputs.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print the errors as JSON.")] = False,
) -> None:
    """Check an ONNX file: by itself, against another file, or against the PyTorch model it was made from.

    By itself it must pass onnx.checker, load and run on onnxruntime, and give finite values. Against a model it is
    run on the example, on other sizes of every open dimension and on random inputs, as export does. The exit
    code is 1 if it departs; the message names the output and, if it can be found, the first node that departs.

    Example: adapter-compiler verify model.onnx --model my_model.py:build --adapters adapters/
    """
    sys.path.insert(0, "")
    with reported_errors(as_json=as_json):
        _assert_fit(against, model, adapters)
        if model is None:
            from adapter_compiler.onnx.verification.compare_files import verify_file

            errors: Sequence[OutputError] = verify_file(file, against=against, draws=draws)
            other, refused = str(against or "itself"), tuple[str, ...]()
        else:
            checked = _verify_model(file, model, adapters, draws)
            errors, refused, other = checked.errors, checked.not_verified, model
        if as_json:
            rows = [dataclasses.asdict(error) for error in errors]
            write_json({"file": str(file), "against": other, "errors": rows, "not_verified": refused})
        else:
            _show(file, other, errors, refused)


def _assert_fit(against: Path | None, model: str | None, adapters: Path | None) -> None:
    from adapter_compiler.errors import ConfigError

    if against is not None and model is not None:
        raise ConfigError("--against and --model name two things to compare with; give one of them")
    if adapters is not None and model is None:
        raise ConfigError("--adapters are loaded into a model; name it with --model")


def _verify_model(file: Path, target: str, adapters: Path | None, draws: int) -> FileVerification:
    from adapter_compiler.onnx.verify_model import verify_onnx

    found = load_target(target)
    model = found.model if adapters is None else with_adapters(found.model, adapters)
    return verify_onnx(file, model, found.args, found.kwargs, draws=draws)


def _show(file: Path, other: str, errors: Sequence[OutputError], refused: Sequence[str]) -> None:
    cases = list(dict.fromkeys(error.case for error in errors))
    write_text(f"{file} agrees with {other} on {len(cases)} inputs: {', '.join(cases)}")
    table = Table("output")
    for heading in ("max abs error", "max rel error"):
        table.add_column(heading, justify="right")
    for output in dict.fromkeys(error.output for error in errors):
        own = [error for error in errors if error.output == output]
        table.add_row(output, f"{max(e.max_abs for e in own):.1e}", f"{max(e.max_rel for e in own):.1e}")
    write_text(table)
    for case in refused:
        write_text(f"not verified on {case}: the model itself refuses it")
