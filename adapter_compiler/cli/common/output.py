"""Output of all commands: the result on standard output, progress and errors on standard error.

With ``--json``, standard output gets one JSON document and nothing else: whatever else prints there while the command
runs (the user's code, exporters, libraries in C++) goes to standard error. This changes the process's own streams, so
it is done here only, for commands, and never in the library.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.progress import Progress, TextColumn

from adapter_compiler.errors import AdapterCompilerError

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
WithTraceback = Annotated[
    bool, typer.Option("--traceback", help="Show where in the code an error happened, not just its message.")
]


class Output:
    """Where a command writes its result.

    Attributes:
        as_json: whether the result is one JSON document.
    """

    def __init__(self, stream: TextIO, *, as_json: bool) -> None:
        self.as_json = as_json
        self._stream = stream

    def write(self, data: Any, *shown: Any) -> None:
        """Write the result: ``data`` as JSON, or what is to be shown of it, texts and tables of rich."""
        if self.as_json:
            self._stream.write(dump_json(data) + "\n")
            self._stream.flush()
            return
        for one in shown:
            Console(file=self._stream, soft_wrap=isinstance(one, str), markup=not isinstance(one, str)).print(
                one, highlight=False
            )


@contextlib.contextmanager
def command_output(*, as_json: bool, with_traceback: bool = False) -> Iterator[Output]:
    """A context for a command: it writes to the output that this yields, and its errors end the process with code 1.

    Errors of the library and of the file system become one line, or a JSON object. Other errors are faults of this
    program and are shown in full; with ``as_json`` there is an object for them as well.

    Args:
        as_json: write JSON.
        with_traceback: show in full where any error happened.
    """
    with _reserved_stdout() if as_json else contextlib.nullcontext(sys.stdout) as stream:
        output = Output(stream, as_json=as_json)
        try:
            yield output
        except typer.Exit:
            raise
        except Exception as error:
            is_expected = isinstance(error, (AdapterCompilerError, OSError))
            if not (is_expected or as_json or with_traceback):
                raise
            _report(error, output, in_full=with_traceback or not is_expected)
            raise typer.Exit(1) from error


def _report(error: Exception, output: Output, *, in_full: bool) -> None:
    message = " ".join(str(error).split())
    if in_full:
        traceback.print_exception(error)
    if output.as_json:
        output.write({"error": type(error).__name__, "message": message})
    elif not in_full:
        Console(stderr=True).print(f"error: {message}", markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def _reserved_stdout() -> Iterator[TextIO]:
    """Inside, whatever is printed to standard output goes to standard error; yields the real standard output."""
    with contextlib.ExitStack() as stack:
        stream = stack.enter_context(_reserved_descriptor(sys.stdout))
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield stream


@contextlib.contextmanager
def _reserved_descriptor(stream: TextIO) -> Iterator[TextIO]:
    """The same for code that prints without Python; where a stream has no descriptor, nothing is done."""
    try:
        descriptor, other = stream.fileno(), sys.stderr.fileno()
    except (OSError, io.UnsupportedOperation):
        yield stream
        return
    stream.flush()
    saved = os.dup(descriptor)
    os.dup2(other, descriptor)
    try:
        with os.fdopen(os.dup(saved), "w", encoding=stream.encoding, newline="") as reserved:
            yield reserved
    finally:
        _flush_c_streams()  # what C has buffered until now still goes to standard error
        os.dup2(saved, descriptor)
        os.close(saved)


def _flush_c_streams() -> None:
    if sys.platform != "win32":
        ctypes.CDLL(None).fflush(None)


def dump_json(data: Any) -> str:
    """The JSON text of plain data. Numbers that JSON does not have become the strings NaN, Infinity and -Infinity."""
    return json.dumps(_without_special_numbers(data), indent=2, default=str, allow_nan=False)


def _without_special_numbers(data: Any) -> Any:
    if isinstance(data, float) and not math.isfinite(data):
        return "NaN" if math.isnan(data) else "Infinity" if data > 0 else "-Infinity"
    if isinstance(data, Mapping):
        return {key: _without_special_numbers(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [_without_special_numbers(value) for value in data]
    return data


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, if that is a terminal.

    Yields:
        A function to call with the name of the present item, the number of finished items, and the number of all.
    """
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[name]}"))
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, name="")

        def advance(name: str, done: int, total: int) -> None:
            bar.update(task, completed=done, total=total, name=name)

        yield advance
