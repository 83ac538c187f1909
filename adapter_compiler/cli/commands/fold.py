"""``adapter-compiler fold``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from adapter_compiler.cli.common.output import AsJson, command_output, progress_bar


def fold(
    base: Annotated[Path, typer.Argument(help="A .safetensors or .onnx file, an index of shards, or a folder.")],
    adapters: Annotated[Path, typer.Argument(help="A folder of AdaptedModel.save or of PEFT.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The file or folder to write.")],
    base_weights: Annotated[
        str,
        typer.Option(
            help="What the updates are added to, where adapters were trained over quantized weights and their folder "
            "says so: 'trained', the base quantized in the same way and unpacked, or 'given', the base as it is."
        ),
    ] = "trained",
    as_json: AsJson = False,
) -> None:
    """Merge trained adapters into a checkpoint file, one weight at a time, without the model's code.

    The result is bit-for-bit the same as that of AdaptedModel.fold(), unless --base-weights is 'given'.

    Example: adapter-compiler fold llama/ adapters/ -o merged/
    """
    from adapter_compiler.saving.folding.fold_files import fold_files

    with command_output(as_json=as_json) as output:
        with progress_bar("folding") as advance:
            changed = fold_files(base, adapters, out, progress=advance, base_weights=base_weights)
        output.write({"out": str(out), "changed": changed}, f"wrote {out}: {len(changed)} tensors changed")
