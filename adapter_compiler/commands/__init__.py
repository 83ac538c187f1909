"""The commands: the demo, and fold, export, verify and adapters on files."""

from __future__ import annotations

import typer

from adapter_compiler.commands.adapters import adapters_app
from adapter_compiler.commands.demo import demo
from adapter_compiler.commands.export import export
from adapter_compiler.commands.fold import fold
from adapter_compiler.commands.sites import sites
from adapter_compiler.commands.verify import verify


def register_commands(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(demo)
    app.command()(sites)
    app.command()(fold)
    app.command()(export)
    app.command()(verify)
    app.add_typer(adapters_app, name="adapters")


__all__ = ["register_commands"]
