"""``adapter-compiler quantize``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from adapter_compiler.cli.common.output import AsJson, WithTraceback, command_output
from adapter_compiler.cli.common.target import DATA_HELP, METRIC_HELP, load_data


def quantize(
    file: Annotated[Path, typer.Argument(help="An ONNX file that `export` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")],
    kind: Annotated[str, typer.Option(help="int8, int8-static, int4 or float16.")] = "int8",
    data: Annotated[str | None, typer.Option(help=f"For calibration and for comparing. {DATA_HELP}")] = None,
    metric: Annotated[str | None, typer.Option(help=METRIC_HELP)] = None,
    adapter: Annotated[
        list[Path] | None, typer.Option(help="An .onnx_adapter file to compare with as well; can be repeated.")
    ] = None,
    largest_rel_error: Annotated[
        float | None, typer.Option(help="The largest accepted difference over the largest value of an output.")
    ] = None,
    as_json: AsJson = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Write a smaller copy of an exported file by onnxruntime's quantizers, and measure what that changes.

    A file with run-time adapters keeps its inputs for them. Without --data, they are compared on random values.

    Example: adapter-compiler quantize model.onnx -o small.onnx --kind int4 --data my_data.py:load
    """
    from adapter_compiler.onnx.quantize import quantize_onnx

    sys.path.insert(0, "")
    with command_output(as_json=as_json, with_traceback=with_traceback) as output:
        samples, function = load_data(data, metric)
        report = quantize_onnx(
            file,
            out,
            kind=kind,
            samples=samples,
            metric=function,
            adapters=adapter or [],
            largest_rel_error=largest_rel_error,
        )
        output.write(report.to_dict(), *report.describe())
