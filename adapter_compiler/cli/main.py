"""The entry point of the command line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperGroup

from adapter_compiler.cli.commands.adapters import adapters_app
from adapter_compiler.cli.commands.demo import demo
from adapter_compiler.cli.commands.export import export
from adapter_compiler.cli.commands.fold import fold
from adapter_compiler.cli.commands.quantize import quantize
from adapter_compiler.cli.commands.report import report
from adapter_compiler.cli.commands.sites import sites
from adapter_compiler.cli.commands.tune import tune
from adapter_compiler.cli.commands.verify import verify
from adapter_compiler.cli.common.output import dump_json


class _Commands(TyperGroup):
    """All commands. With ``--json``, wrong usage is answered by JSON as well."""

    def main(  # type: ignore[override]  # the other arguments are named ones here
        self, args: Sequence[str] | None = None, *, standalone_mode: bool = True, **options: Any
    ) -> Any:
        """Run the command that ``args`` name, by default those of the process."""
        arguments = sys.argv[1:] if args is None else list(args)
        if not standalone_mode or "--json" not in arguments:
            return super().main(args, standalone_mode=standalone_mode, **options)
        try:
            code = super().main(args, standalone_mode=False, **options)
        except Exception as error:
            if not (hasattr(error, "format_message") and hasattr(error, "exit_code")):  # as typer's usage errors have
                raise
            message = " ".join(error.format_message().split())
            typer.echo(dump_json({"error": type(error).__name__, "message": message}))
            code = error.exit_code
        sys.exit(code if isinstance(code, int) else 0)


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False, pretty_exceptions_show_locals=False)


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
app.command()(quantize)
app.command()(tune)
app.command()(report)
app.add_typer(adapters_app, name="adapters")
