"""``adapter-compiler tune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adapter_compiler.cli.common.output import AsJson, WithTraceback, command_output
from adapter_compiler.cli.common.target import call_function
from adapter_compiler.errors import ConfigError

if TYPE_CHECKING:
    from adapter_compiler.training.tuning.size_search import SizePoint, SizeSearch

_HELP = (
    "FILE.py:FUNCTION or MODULE:FUNCTION. The code is run: the module is imported, and the function is called to get "
    "(build, train, evaluate), as for adapter_compiler.find_smallest."
)
_EXPECTED = "expected a function without arguments that returns (build, train, evaluate), three functions"


def tune(
    target: Annotated[str, typer.Argument(help=_HELP)],
    share: Annotated[
        float | None, typer.Option(min=0, max=1, help="The share of the full gain that is enough; 0.95 by default.")
    ] = None,
    metric: Annotated[float | None, typer.Option(help="The score that is enough, in place of --share.")] = None,
    full: Annotated[float | None, typer.Option(help="The score of full fine-tuning, if you know it.")] = None,
    recovery: Annotated[float, typer.Option(min=0, max=1, help="The share of the steps that a cut is trained.")] = 0.2,
    runs: Annotated[int, typer.Option(min=1, help="How often to do all of it, for the uncertainty.")] = 1,
    refinements: Annotated[int, typer.Option(min=0, help="How often to halve the last interval.")] = 4,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Write the recommended adapter to a folder.")] = None,
    as_json: AsJson = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Find the smallest adapter that is enough: train a wide one, and cut it to a ladder of sizes.

    Example: adapter-compiler tune my_task.py:task --share 0.95 -o adapters/
    """
    from adapter_compiler.training.tuning.find_smallest import find_smallest

    sys.path.insert(0, "")
    with command_output(as_json=as_json, with_traceback=with_traceback) as output:
        build, train, evaluate = _check(target, call_function(target, _EXPECTED))
        found = find_smallest(
            build,
            train,
            evaluate,
            share_of_full=share,
            metric=metric,
            full=full,
            recovery=recovery,
            runs=runs,
            refinements=refinements,
        )
        written = [] if out is None else [str(found.adapted.save(out))]
        data = {**found.to_dict(), "written": written}
        output.write(data, *_show(found), *(f"wrote {file}" for file in written))


def _check(spec: str, returned: Any) -> tuple[Any, Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 3 or not all(map(callable, returned)):
        raise ConfigError(f"{spec!r} returned a {type(returned).__name__}; {_EXPECTED}")
    build, train, evaluate = returned
    return build, train, evaluate


def _show(found: SizeSearch) -> tuple[Table, str]:
    table = Table("values", "triplets", "score", "share of the full gain", "")
    for point in found.points:
        table.add_row(*_to_cells(point), "recommended" if point == found.recommended else "")
    note = f"before training {found.base:.4g}, full {found.full:.4g}, enough {found.target:.4g}; {found.runs} run(s)"
    return table, note


def _to_cells(point: SizePoint) -> tuple[str, ...]:
    from adapter_compiler.training.tuning.size_search import show_error

    score, share = show_error(point.score, point.error), show_error(point.share, point.share_error)
    return f"{point.values:,.0f}", str(point.triplets), score, share
