"""The command line."""

from __future__ import annotations

import typer

from adapter_compiler.commands import register_commands

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)
register_commands(app)


@app.callback()
def main() -> None:
    """Adaptive low-rank adapters for any PyTorch model: trained, pruned, folded into its weights, exported to ONNX.

    Example: adapter-compiler demo --out results
    """
