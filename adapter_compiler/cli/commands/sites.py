"""``adapter-compiler sites``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from adapter_compiler.cli.commands.output import reported_errors, write_json, write_text
from adapter_compiler.cli.commands.target import load_target


def sites(
    target: Annotated[str, typer.Argument(help="FILE.py:FUNCTION or MODULE:FUNCTION; returns (model, args, kwargs).")],
    rank: Annotated[int | None, typer.Option(min=1, help="Rank of every adapter.")] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="Adapt these roles only, as in 'attention.*'; may be given more than once.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="A glob of weights to leave alone.")] = None,
    plan: Annotated[Path | None, typer.Option(help="Write the adapter plan here, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the model's blocks here (.png, .svg or .pdf).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Show where a model's adapters would go: every weight with its role, block, region, rank and cost.

    Each weight that gets no adapter is listed with the reason. A model on the meta device needs no memory.
    The function may also return an adapted model, which is then shown as it is.

    Example: adapter-compiler sites my_model.py:build --role 'attention.*' --picture sites.png
    """
    from adapter_compiler.compile import compile_with_adapters
    from adapter_compiler.config.adapter_config import AdapterConfig
    from adapter_compiler.model.adapted_model import AdaptedModel
    from adapter_compiler.report.model_picture import draw_model
    from adapter_compiler.saving.primitives.files import written_beside
    from passes.planning.rules import AdapterRule

    sys.path.insert(0, "")
    with reported_errors(as_json=as_json):
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
        if as_json:
            write_json({**model.report().to_dict(), "written": [str(file) for file in written]})
            return
        write_text(model.report())
        for file in written:
            write_text(f"wrote {file}")
