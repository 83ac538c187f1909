"""The command line. Commands parse options and hand on; errors of the library become one line and exit code 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from adapter_compiler.commands import register_commands
from adapter_compiler.demo.options import GREATEST_TARGET_RANK, LEAST_STEPS, LEAST_TARGET_RANK, DemoOptions
from adapter_compiler.errors import AdapterCompilerError


class _Commands(TyperGroup):
    """A group whose commands may raise what the library raises on purpose."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; print an expected error as one line and exit with 1."""
        try:
            return super().invoke(ctx)
        except AdapterCompilerError as error:
            message = " ".join(str(error).split())
            Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
register_commands(app)


@app.callback()
def main() -> None:
    """Adaptive low-rank adapters for any PyTorch model: trained, pruned, folded into its weights, exported to ONNX.

    Example: adapter-compiler demo --out results
    """


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for model.onnx and report.png.")] = DemoOptions.out,
    seed: Annotated[int, typer.Option(min=0, help="Decides the split, the weights and the batches.")] = (
        DemoOptions.seed
    ),
    steps: Annotated[int, typer.Option(min=LEAST_STEPS, help="Training steps of the adapters.")] = DemoOptions.steps,
    pretraining_steps: Annotated[
        int, typer.Option(min=LEAST_STEPS, help="Training steps of the model before the task changes.")
    ] = DemoOptions.pretraining_steps,
    target_rank: Annotated[
        float,
        typer.Option(
            min=LEAST_TARGET_RANK, max=GREATEST_TARGET_RANK, help="Average rank of the adapters after pruning."
        ),
    ] = DemoOptions.target_rank,
) -> None:
    """Adapt a small vision transformer to rotated and inverted digits, and export it to verified ONNX.

    Needs no network and about a minute. Writes model.onnx and report.png.

    Example: adapter-compiler demo --out results --seed 1 --target-rank 4
    """
    from adapter_compiler.demo.run import run_demo

    options = DemoOptions(out=out, seed=seed, steps=steps, pretraining_steps=pretraining_steps, target_rank=target_rank)
    run_demo(options, Console())
