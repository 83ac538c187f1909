"""``adapter-compiler adapters``: list, inspect and convert folders of trained adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from adapter_compiler.cli.commands.exchanged import add_reference
from adapter_compiler.cli.common.output import AsJson, command_output

adapters_app = typer.Typer(no_args_is_help=True, help="List, inspect and convert folders of trained adapters.")


@adapters_app.command("list")
def list_adapters(
    folder: Annotated[Path, typer.Argument(help="A folder; the folders below it are searched.")],
    as_json: AsJson = False,
) -> None:
    """List the folders of adapters in a folder, with kind, number of sites and live rank.

    Example: adapter-compiler adapters list runs/
    """
    with command_output(as_json=as_json) as output:
        rows = [_summarize(path) for path in _find_folders(folder)]
        table = Table("folder", "kind", "sites", "average live rank", "values")
        for row in rows:
            numbers = (str(row[key]) for key in ("sites", "average_rank", "values"))
            table.add_row(Text(row["folder"], overflow="fold"), row["kind"], *numbers)
        output.write(rows, table if rows else f"no adapters in {folder} or in a folder below it")


@adapters_app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(help="A folder of AdaptedModel.save or of PEFT.")],
    as_json: AsJson = False,
) -> None:
    """Show each adapted weight with its shape, form, rank, live triplets, scale and the size of its update.

    Example: adapter-compiler adapters inspect adapters/
    """
    with command_output(as_json=as_json) as output:
        rows = _describe_sites(folder)
        table = Table("weight", "shape", "form", "rank", "live", "scale", "norm of the update")
        for row in rows:
            shape = "×".join(map(str, row["shape"]))
            cells = (row["rank"], row["live"], f"{row['scale']:.3g}", f"{row['update_norm']:.3g}")
            table.add_row(Text(row["weight"], overflow="fold"), shape, row["form"], *map(str, cells))
        output.write({**_summarize(folder), "weights": rows} if as_json else None, table)


@adapters_app.command()
def convert(
    folder: Annotated[Path, typer.Argument(help="A folder of AdaptedModel.save or of PEFT.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write; for gguf and ort the file.")],
    to: Annotated[
        str,
        typer.Option(
            help="native, peft (= peft-lora, of the live ranks), peft-adalora, lora (one rank, no patterns), vllm, "
            "gguf (llama.cpp), mlx (mlx-lm), diffusers or ort (onnxruntime)."
        ),
    ],
    base: Annotated[
        Path | None,
        typer.Option(
            help="For gguf and mlx: the base model's folder with its config.json. For ort: the base model's file, "
            "which was exported with --runtime (adapters='runtime')."
        ),
    ] = None,
    component: Annotated[
        str | None, typer.Option(help="For diffusers: the part of the pipeline, such as unet or transformer.")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(help="The base model as FILE.py:FUNCTION; inputs and outputs of one call are written as well."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write adapters in the format of another run time, by its own rule of scales and ranks, or say what it lacks.

    Example: adapter-compiler adapters convert adapters/ -o adapter.gguf --to gguf --base base_model/
    """
    from adapter_compiler.saving.exchange.convert import convert_adapters

    with command_output(as_json=as_json) as output:
        written = convert_adapters(folder, out, to=to, base=base, component=component)
        if reference is not None:
            add_reference(written, folder, reference)
        output.write(_describe_written(written, to) if as_json else None, f"wrote {written}")


def _describe_written(written: Path, to: str) -> dict[str, Any]:
    """What was written, read back where this tool reads the format."""
    if to.startswith(("native", "peft", "lora", "vllm")):
        return _summarize(written)
    from adapter_compiler.saving.exchange.manifest import find_manifest, read_manifest

    weights = read_manifest(find_manifest(written))["weights"]
    rank = sum(weight["rank"] for weight in weights.values()) / len(weights)
    key = "file" if written.is_file() else "folder"
    return {key: str(written), "kind": to, "sites": len(weights), "average_rank": round(rank, 2)}


def _find_folders(folder: Path) -> list[Path]:
    from adapter_compiler.errors import CheckpointError
    from adapter_compiler.saving.folders.peft_format.config import PEFT_CONFIG
    from adapter_compiler.saving.primitives.adapter_file import FILE_NAME

    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder, expected one that contains folders of adapters; give another")
    return sorted({path.parent for name in (FILE_NAME, PEFT_CONFIG) for path in folder.rglob(name)})


def _summarize(folder: Path) -> dict[str, Any]:
    from adapter_compiler.saving.folders.read_folder import read_saved_adapters

    saved = read_saved_adapters(folder)
    rows = _describe_sites(folder)
    live = sum(row["live"] for row in rows)
    return {
        "folder": str(folder),
        "kind": saved.kind,
        "sites": len(rows),
        "average_rank": round(live / max(1, len(rows)), 2),
        "values": sum(row["values"] for row in rows),
        "trained_fully": list(saved.replacements),
    }


def _describe_sites(folder: Path) -> list[dict[str, Any]]:
    import torch

    from adapter_compiler.saving.folders.read_folder import read_saved_adapters

    saved = read_saved_adapters(folder)
    rows = []
    for name, adapter in saved.adapters.items():
        parameters = saved.parameters_of(name)
        delta = adapter.planned.form.delta({k: v.double() for k, v in parameters.items()}, adapter.planned.scale)
        rank = next((len(parameters[key]) for key in ("lam", "A") if key in parameters), adapter.planned.rank)
        rows.append(
            {
                "weight": name,
                "shape": list(adapter.planned.site.shape),
                "form": adapter.planned.form.name,
                "rank": rank,
                "live": int(torch.count_nonzero(parameters["lam"])) if "lam" in parameters else rank,
                "scale": adapter.planned.scale,
                "values": sum(value.numel() for value in parameters.values()),
                "update_norm": float(delta.norm()),
            }
        )
    return rows
