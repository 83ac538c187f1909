"""``adapter-compiler demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from adapter_compiler.cli.common.output import command_output
from adapter_compiler.cli.demo.options import GREATEST_TARGET_RANK, LEAST_STEPS, LEAST_TARGET_RANK, DemoOptions

_Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for model.onnx, report.html and report.png.")]
_Seed = Annotated[int, typer.Option(min=0, help="Random seed of the split, the weights and the batches.")]
_Steps = Annotated[int, typer.Option(min=LEAST_STEPS, help="Training steps of the adapters.")]
_PretrainingSteps = Annotated[
    int, typer.Option(min=LEAST_STEPS, help="Training steps of the model before the task changes.")
]
_TargetRank = Annotated[
    float,
    typer.Option(min=LEAST_TARGET_RANK, max=GREATEST_TARGET_RANK, help="Average rank of the adapters after pruning."),
]


def demo(
    out: _Out = DemoOptions.out,
    seed: _Seed = DemoOptions.seed,
    steps: _Steps = DemoOptions.steps,
    pretraining_steps: _PretrainingSteps = DemoOptions.pretraining_steps,
    target_rank: _TargetRank = DemoOptions.target_rank,
) -> None:
    """Adapt a small vision transformer to rotated and inverted digits, and export it to verified ONNX.

    Takes about a minute and needs no network. Writes model.onnx, report.html and report.png.

    Example: adapter-compiler demo --out results --seed 1 --target-rank 4
    """
    from adapter_compiler.cli.demo.run import run_demo

    with command_output(as_json=False):
        options = DemoOptions(
            out=out, seed=seed, steps=steps, pretraining_steps=pretraining_steps, target_rank=target_rank
        )
        run_demo(options, Console())
