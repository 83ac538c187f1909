"""``adapter-compiler export``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adapter_compiler.cli.commands.output import reported_errors, write_json, write_text
from adapter_compiler.cli.commands.target import load_target, with_adapters


def export(
    target: Annotated[str, typer.Argument(help="FILE.py:FUNCTION or MODULE:FUNCTION; returns (model, args, kwargs).")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The ONNX file to write.")],
    adapters: Annotated[Path | None, typer.Option(help="Folder of trained adapters to load first.")] = None,
    runtime: Annotated[bool, typer.Option(help="Leave the adapters as inputs instead of merging them.")] = False,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set, 7 to 25; default: the exporter's.")] = None,
    int8: Annotated[Path | None, typer.Option(help="Also write the file with int8 weights here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Export a model to ONNX and verify the file against PyTorch.

    A plain model gets the adapters merged into its weights. With --runtime the function must return an
    AdaptedModel; the adapters are then written beside the file as .onnx_adapter.

    Example: adapter-compiler export my_model.py:build --adapters adapters/ -o model.onnx
    """
    from adapter_compiler.onnx import export_onnx, save_onnx_adapter
    from adapter_compiler.onnx.quantize import quantize_onnx

    sys.path.insert(0, "")
    with reported_errors(as_json=as_json):
        found = load_target(target)
        model = found.model if adapters is None else with_adapters(found.model, adapters)
        kind = "runtime" if runtime else "merged"
        report = export_onnx(model, out, found.args, found.kwargs, opset=opset, adapters=kind)
        result: dict[str, Any] = report.to_dict()
        lines: list[Any] = [report]
        if runtime:
            file = save_onnx_adapter(model, out.with_suffix(".onnx_adapter"))  # type: ignore[arg-type]
            result["adapter_file"] = str(file)
            lines.append(f"wrote {file}")
        if int8 is not None:
            small = quantize_onnx(out, int8)
            agreement = small.argmax_agreement
            result["int8"] = {
                "path": str(int8),
                "bytes": small.bytes_after,
                "max_rel_error": small.max_rel_error,
                "argmax_agreement": agreement,
            }
            shown = "" if agreement is None else f", argmax agrees on {agreement:.1%}"
            lines.append(f"wrote {int8}: {small.bytes_after:,} bytes, error {small.max_rel_error:.1%}{shown}")
        if as_json:
            write_json(result)
        else:
            for line in lines:
                write_text(line)
