"""``adapter-compiler verify``."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from adapter_compiler.cli.commands.exchanged import describe_adapter, is_exchanged
from adapter_compiler.cli.common.output import AsJson, WithTraceback, command_output
from adapter_compiler.cli.common.target import (
    DATA_HELP,
    METRIC_HELP,
    TARGET_HELP,
    load_data,
    load_target,
    with_adapters,
)

if TYPE_CHECKING:
    from adapter_compiler.onnx.verify_model import FileVerification


def verify(
    file: Annotated[Path, typer.Argument(help="An ONNX file, or an adapter of `adapters convert`.")],
    against: Annotated[Path | None, typer.Option(help="Another ONNX file to compare with.")] = None,
    model: Annotated[
        str | None,
        typer.Option(help=f"The PyTorch model to compare with. {TARGET_HELP}"),
    ] = None,
    adapters: Annotated[Path | None, typer.Option(help="With --model: folder of trained adapters to load.")] = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="For an exchanged adapter: the base model as FILE.py:FUNCTION, as its folder with config.json, or as "
            "the ONNX file that takes the adapter."
        ),
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Number of random inputs.")] = 8,
    data: Annotated[str | None, typer.Option(help=f"With --model or --against: {DATA_HELP}")] = None,
    metric: Annotated[str | None, typer.Option(help=METRIC_HELP)] = None,
    public_key: Annotated[
        Path | None, typer.Option(help="First check the signature of `export --sign` with this Ed25519 key (PEM).")
    ] = None,
    as_json: AsJson = False,
    with_traceback: WithTraceback = False,
) -> None:
    """Check an ONNX file or an exchanged adapter.

    An ONNX file is checked alone, against another file, or against the PyTorch model that it was exported from. An
    adapter that `adapters convert` wrote is read by its reader's rule and compared with the manifest beside it; its
    reference call is replayed in PyTorch, peft, diffusers, onnxruntime and mlx-lm, where they and the base are at hand.

    Alone, it must pass onnx.checker, load and run on onnxruntime, and give finite values. Against a model, it is run
    on the example, on other sizes of every dynamic dimension and on random inputs, as in an export. With --data, it is
    also run on your own data; errors, argmax agreement and your metric of both sides are listed. The exit code is 1 if
    the results differ; the message names the output and, if it can be found, the first node that differs.

    With --public-key, the files must be those that were signed, before any of them is opened.

    Example: adapter-compiler verify model.onnx --model my_model.py:build --adapters adapters/
    """
    sys.path.insert(0, "")
    with command_output(as_json=as_json, with_traceback=with_traceback) as output:
        _assert_fit(against, model, adapters, data)
        signed = () if public_key is None else _verify_signature(file, public_key)
        if is_exchanged(file):
            output.write(*describe_adapter(file, base))
            return
        samples, function = load_data(data, metric)
        if model is None:
            checked = _verify_file(file, against, draws, samples, function)
        else:
            checked = _verify_model(file, model, adapters, draws, samples, function)
        other = model or str(against or "itself")
        rows = [dataclasses.asdict(error) for error in checked.errors]
        found = [dataclasses.asdict(one) for one in checked.samples]
        result = {"file": str(file), "against": other, "errors": rows, "not_verified": checked.not_verified}
        lines = [line for one in checked.samples for line in one.describe()]
        if public_key is not None:
            lines.append(f"signed by the owner of {public_key}: {', '.join(signed)}")
        output.write({**result, "samples": found, "signed": list(signed)}, *_show(file, other, checked), *lines)


def _assert_fit(against: Path | None, model: str | None, adapters: Path | None, data: str | None) -> None:
    from adapter_compiler.errors import ConfigError

    if against is not None and model is not None:
        raise ConfigError("both --against and --model are given, expected one thing to compare with; give one of them")
    if adapters is not None and model is None:
        raise ConfigError("--adapters is given without --model, expected the model to load them into; give --model")
    if data is not None and model is None and against is None:
        raise ConfigError("--data is given alone, expected what to compare with on it; give --model or --against")


def _verify_signature(file: Path, public_key: Path) -> tuple[str, ...]:
    from adapter_compiler.onnx.provenance.signature import verify_signature

    return verify_signature(file, public_key)


def _verify_file(file: Path, against: Path | None, draws: int, samples: Any, metric: Any) -> FileVerification:
    from adapter_compiler.onnx.verification.compare_files import compare_on_samples, verify_file
    from adapter_compiler.onnx.verify_model import FileVerification

    errors = verify_file(file, against=against, draws=draws)
    found = () if samples is None or against is None else (compare_on_samples(file, against, samples, metric),)
    return FileVerification(path=file, errors=tuple(errors), not_verified=(), samples=found)


def _verify_model(
    file: Path, target: str, adapters: Path | None, draws: int, samples: Any, metric: Any
) -> FileVerification:
    from adapter_compiler.onnx.verify_model import verify_onnx

    found = load_target(target)
    model = found.model if adapters is None else with_adapters(found.model, adapters)
    return verify_onnx(file, model, found.args, found.kwargs, draws=draws, samples=samples, metric=metric)


def _show(file: Path, other: str, checked: FileVerification) -> Iterator[Any]:
    errors = checked.errors
    cases = list(dict.fromkeys(error.case for error in errors))
    yield f"{file} agrees with {other} on {len(cases)} inputs: {', '.join(cases)}"
    table = Table("output")
    for heading in ("max abs error", "max rel error"):
        table.add_column(heading, justify="right")
    for output in dict.fromkeys(error.output for error in errors):
        own = [error for error in errors if error.output == output]
        table.add_row(output, f"{max(e.max_abs for e in own):.1e}", f"{max(e.max_rel for e in own):.1e}")
    yield table
    yield from (f"not verified on {case}: the model itself fails on it" for case in checked.not_verified)
