"""What all commands share: JSON on standard output, progress on standard error, errors in one line."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from adapter_compiler.errors import AdapterCompilerError


@contextlib.contextmanager
def reported_errors(*, as_json: bool) -> Iterator[None]:
    """Turn errors of the library and of the file system into one line, or one JSON object, and exit code 1."""
    try:
        yield
    except (AdapterCompilerError, OSError) as error:
        message = " ".join(str(error).split())
        if as_json:
            write_json({"error": type(error).__name__, "message": message})
        else:
            Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


def write_json(data: Any) -> None:
    """One JSON document on standard output."""
    typer.echo(json.dumps(data, indent=2, default=str))


def write_text(text: Any) -> None:
    """Text or a table on standard output."""
    Console(soft_wrap=isinstance(text, str)).print(text, highlight=False)


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A bar on standard error; what it yields is called with a name, how many are done, and how many there are."""
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[name]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, name="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield advance
