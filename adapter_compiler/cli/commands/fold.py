"""``adapter-compiler fold``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapter_compiler.cli.commands.output import progress_bar, reported_errors, write_json, write_text


def fold(
    base: Annotated[Path, typer.Argument(help="A .safetensors or .onnx file, an index of shards, or a folder.")],
    adapters: Annotated[Path, typer.Argument(help="A folder of AdaptedModel.save or of PEFT.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Merge trained adapters into a base file, one weight at a time, without the model's code.

    The result is bit for bit that of AdaptedModel.fold().

    Example: adapter-compiler fold llama/ adapters/ -o merged/
    """
    from adapter_compiler.saving.folding.fold_files import fold_files

    with reported_errors(as_json=as_json):
        with progress_bar("folding") as advance:
            changed = fold_files(base, adapters, out, progress=advance)
        if as_json:
            write_json({"out": str(out), "changed": changed})
        else:
            write_text(f"wrote {out}: {len(changed)} tensors changed")
