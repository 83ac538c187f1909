"""``adapter-compiler fold``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapter_compiler.cli.commands.output import AsJson, command_output, progress_bar


def fold(
    base: Annotated[Path, typer.Argument(help="A .safetensors or .onnx file, an index of shards, or a folder.")],
    adapters: Annotated[Path, typer.Argument(help="A folder of AdaptedModel.save or of PEFT.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write.")],
    as_json: AsJson = False,
) -> None:
    """Merge trained adapters into a checkpoint file, one weight at a time, without the model's code.

    The result is bit-for-bit the same as that of AdaptedModel.fold().

    Example: adapter-compiler fold llama/ adapters/ -o merged/
    """
    from adapter_compiler.saving.folding.fold_files import fold_files

    with command_output(as_json=as_json) as output:
        with progress_bar("folding") as advance:
            changed = fold_files(base, adapters, out, progress=advance)
        output.write({"out": str(out), "changed": changed}, f"wrote {out}: {len(changed)} tensors changed")
