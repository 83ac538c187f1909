"""``adapter-compiler sites``."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from adapter_compiler.cli.common.output import AsJson, WithTraceback, command_output
from adapter_compiler.cli.common.target import TARGET_HELP, load_target

if TYPE_CHECKING:
    from adapter_compiler.model.adapted_model import AdaptedModel

#: The width that the list of weights is made for.
_COLUMNS = 80


def sites(
    target: Annotated[str, typer.Argument(help=TARGET_HELP)],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every adapter.")] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="Adapt these roles only, as in 'attention.*'; may be given more than once.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A glob of weights that get no adapter.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the adapter plan to this file, as JSON.")] = None,
    picture: Annotated[
        Path | None, typer.Option(help="Write a picture of the model's blocks to this file (.png, .svg or .pdf).")
    ] = None,
    as_json: AsJson = False,
    with_traceback: WithTraceback = False,
) -> None:
    """List the weights that would get an adapter, with role, block, rank and number of values.

    Each weight without an adapter is listed with the reason. A model on the meta device needs no memory.
    If the function returns an adapted model, the adapters of this model are listed.

    Example: adapter-compiler sites my_model.py:build --role 'attention.*' --picture sites.png
    """
    from adapter_compiler.compile import compile_with_adapters
    from adapter_compiler.config.adapter_config import AdapterConfig
    from adapter_compiler.model.adapted_model import AdaptedModel
    from adapter_compiler.report.model_picture import draw_model
    from adapter_compiler.saving.primitives.files import written_beside
    from passes.planning.rules import AdapterRule

    sys.path.insert(0, "")
    with command_output(as_json=as_json, with_traceback=with_traceback) as output:
        found = load_target(target)
        rules = (AdapterRule(role=tuple(role)), AdapterRule(exclude=True, required=False)) if role else ()
        options: dict[str, Any] = {"rank": rank, "exclude": tuple(exclude or ()), "rules": rules}
        config = AdapterConfig(**{name: value for name, value in options.items() if value})
        model = found.model
        if not isinstance(model, AdaptedModel):
            model = compile_with_adapters(model, found.args, found.kwargs, config=config)
        if plan is not None:
            with written_beside(plan) as draft:
                draft.write_text(model.plan.to_json(), encoding="utf-8")
        if picture is not None:
            draw_model(model, picture)
        written = [file for file in (plan, picture) if file is not None]
        data = {**model.report().to_dict(), "written": [str(file) for file in written]}
        output.write(data, *_show(model), *(f"wrote {file}" for file in written))


def _show(model: AdaptedModel) -> Iterator[str]:
    """The weights by block, equal blocks once, in 80 columns; then the weights without an adapter, with the reason."""
    from adapter_compiler.report.model_map import map_model

    report = model.report()
    values = {(row.role, row.shape, row.rank): f"{row.parameters:,}" for row in report.sites}
    yield f"{len(report.sites)} adapted weights"
    rows: list[tuple[str, ...]] = [("weight", "role", "shape", "rank", "values")]
    for block in map_model(model):
        rows.append((block.title,))
        for weight in block.weights:
            shape, rank = "×".join(map(str, weight.shape)), weight.rank
            count = "" if rank is None else values.get((weight.role, weight.shape, rank), "")
            rows.append((f"  {weight.label}", weight.role, shape, "-" if rank is None else str(rank), count))
    yield from _align(rows)
    yield from (f"no adapter: {name}: {reason}" for name, reason in report.rejected.items())
    yield f"trains {report.trainable_parameters:,} values, {report.trainable_share:.2%} of {report.total_parameters:,}"


def _align(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Rows in columns; numbers to the right. A name that leaves no room for the rest has a line of its own."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(len(row[column]) for row in full) for column in range(len(full[0]))]
    room = _COLUMNS - sum(widths[1:]) - 2 * len(widths[1:])
    widths[0] = min(widths[0], max(room, 0))
    for row in rows:
        if len(row) == 1 or len(row[0]) > widths[0]:
            yield row[0]
        if len(row) > 1:
            name, role, shape, *numbers = row
            name = name if len(name) <= widths[0] else ""
            cells = [name.ljust(widths[0]), role.ljust(widths[1]), shape.ljust(widths[2])]
            cells += [number.rjust(width) for number, width in zip(numbers, widths[3:], strict=True)]
            yield "  ".join(cells).rstrip()
