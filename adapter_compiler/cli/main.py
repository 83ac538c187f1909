"""The command line: the demo, and fold, export, verify and adapters on files."""

from __future__ import annotations

import typer

from adapter_compiler.cli.commands.adapters import adapters_app
from adapter_compiler.cli.commands.demo import demo
from adapter_compiler.cli.commands.export import export
from adapter_compiler.cli.commands.fold import fold
from adapter_compiler.cli.commands.sites import sites
from adapter_compiler.cli.commands.verify import verify

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


@app.callback()
def main() -> None:
    """Adaptive low-rank adapters for any PyTorch model: trained, pruned, folded into its weights, exported to ONNX.

    Example: adapter-compiler demo --out results
    """


app.command()(demo)
app.command()(sites)
app.command()(fold)
app.command()(export)
app.command()(verify)
app.add_typer(adapters_app, name="adapters")
