"""``adapter-compiler export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adapter_compiler.cli.common.output import AsJson, WithTraceback, command_output
from adapter_compiler.cli.common.target import (
    DATA_HELP,
    METRIC_HELP,
    TARGET_HELP,
    load_data,
    load_target,
    with_adapters,
)


def export(
    target: Annotated[str, typer.Argument(help=TARGET_HELP)],
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")],
    adapters: Annotated[Path | None, typer.Option(help="Folder of trained adapters to load first.")] = None,
    runtime: Annotated[
        bool, typer.Option(help="Keep the adapters as inputs of the file instead of merging them.")
    ] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 7 to 25; default: the exporter's.")] = None,
    int8: Annotated[Path | None, typer.Option(help="Also write a file with int8 weights, to this path.")] = None,
    data: Annotated[str | None, typer.Option(help=f"Verify on your own data too. {DATA_HELP}")] = None,
    metric: Annotated[str | None, typer.Option(help=METRIC_HELP)] = None,
    rows: Annotated[bool, typer.Option("--rows", help="Print the errors on each input too.")] = False,
    card: Annotated[bool, typer.Option("--card", help="Write a model card in Markdown beside each file.")] = False,
    bom: Annotated[bool, typer.Option("--bom", help="Write a CycloneDX bill of materials beside each file.")] = False,
    sign: Annotated[
        Path | None,
        typer.Option(help="Sign each file, its card and its bill of materials with this Ed25519 key (PEM)."),
    ] = None,
    as_json: AsJson = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Export a model to ONNX and verify the file against PyTorch.

    The adapters are merged into the weights. With --runtime, the function must return an AdaptedModel; its adapters
    are then written to a second file with the suffix .onnx_adapter.

    The function that is named, and all of the module that it is in, run as they are: use code that you trust.

    Example: adapter-compiler export my_model.py:build --adapters adapters/ -o model.onnx
    """
    from adapter_compiler.onnx import Provenance, export_onnx, save_onnx_adapter, write_provenance
    from adapter_compiler.onnx.quantize import quantize_onnx

    sys.path.insert(0, "")
    with command_output(as_json=as_json, with_traceback=with_traceback) as output:
        provenance = Provenance(card=card, bom=bom, key=sign)
        provenance.assert_ready()
        found = load_target(target)
        model = found.model if adapters is None else with_adapters(found.model, adapters)
        kind = "runtime" if runtime else "merged"
        samples, function = load_data(data, metric)
        options = {"opset": opset, "adapters": kind, "samples": samples, "metric": function, "provenance": provenance}
        report = export_onnx(model, out, found.args, found.kwargs, **options)
        result: dict[str, Any] = report.to_dict()
        lines: list[Any] = [report, *([report.rows()] if rows else [])]
        if runtime:
            file = save_onnx_adapter(model, out.with_suffix(".onnx_adapter"))  # type: ignore[arg-type]
            result["adapter_file"] = str(file)
            lines.append(f"wrote {file}")
        if int8 is not None:
            small = quantize_onnx(out, int8, samples=samples, metric=function)
            result["int8"] = small.to_dict()
            lines += small.describe()
            write_provenance(int8, provenance)
        output.write(result, *lines)
