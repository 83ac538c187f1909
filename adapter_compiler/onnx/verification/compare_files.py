"""Compare ONNX files with each other, on random inputs in the ranges that the export recorded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch

from adapter_compiler.errors import ExportError, VerificationError
from adapter_compiler.onnx.verification.report import OutputError, SampleReport
from adapter_compiler.onnx.verification.samples.compare import Compare, Metric, make_check, run_file
from adapter_compiler.onnx.verification.values import run_session
from adapter_compiler.onnx.verification.verify import compare_values, measure_argmax_agreement, open_session
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import read_metadata
from passes.capture.calls import ModuleCall, split_call

#: Share of ones in random flags; the first of each row is always one, so that no row is masked entirely.
_SHARE_OF_FLAGS = 0.8

Feeds = dict[str, torch.Tensor]


def verify_file(path: str | Path, *, against: str | Path | None = None, draws: int = 8) -> list[OutputError]:
    """Check a file by itself, and compare it with another one if there is one.

    By itself: ``onnx.checker`` accepts it, onnxruntime loads it, and random inputs of the example's sizes
    give finite values.

    Args:
        path: a file that this library exported.
        against: the file that it should agree with, such as an export of the merged model for a folded file.
        draws: random inputs.

    Returns:
        The error of each output on each input; without ``against``, of a second run of the same file.

    Raises:
        ExportError: a file is damaged, or neither has a record of its inputs.
        VerificationError: it does not load, run or give finite values, or the files differ.
    """
    path = Path(path)
    check_file(path)
    session = open_session(path)
    reference = session if against is None else open_session(against)
    errors: list[OutputError] = []
    for case, feeds in draw_feeds(read_input_ranges(path, against), draws):
        expected = run_named(reference, feeds, case)
        found = run_named(session, feeds, case)
        if missing := sorted(expected.keys() ^ found.keys()):
            raise VerificationError(f"output {missing[0]} is in one of the two files only")
        errors += [compare_values(case, name, found[name], want) for name, want in expected.items()]
    return errors


def compare_on_samples(
    path: str | Path,
    against: str | Path,
    samples: Iterable[Any],
    metric: Metric | None = None,
    compare: Compare = compare_values,
) -> SampleReport:
    """Compare a file with another one on the user's data.

    Args:
        path: a file.
        against: the file that it should agree with; one of them has a record of its inputs.
        samples: batches as dicts by the names of the file's inputs, tuples in their order, or tensors.
        metric: as in ``export_onnx``.
        compare: the error of one output.

    Raises:
        ExportError: a file is damaged, or neither has a record of its inputs.
        ConfigError: a batch does not fit, or the metric fails.
        VerificationError: the files differ.
    """
    path, against = Path(path), Path(against)
    check_file(path)
    session, reference = open_session(path), open_session(against)
    example = make_example(read_input_ranges(path, against), reference)
    check = make_check(samples, metric, example)
    assert check is not None
    names = list(example.names)
    return check.compare(run_file(session, names), run_file(reference, names), source=against.name, compare=compare)


def make_example(ranges: Mapping[str, Any], session: onnxruntime.InferenceSession) -> ModuleCall:
    """A call of the recorded sizes, of zeros, with the inputs in the file's order."""
    names = [value.name for value in session.get_inputs() if value.name in ranges]
    entries = {name: ranges[name] for name in (*names, *ranges)}
    return split_call(
        (), {name: torch.zeros(one["shape"], dtype=getattr(torch, one["dtype"])) for name, one in entries.items()}
    )


def check_file(path: Path) -> None:
    """Run ``onnx.checker`` on a file.

    Raises:
        ExportError: the file is missing or invalid.
    """
    if not path.is_file():
        raise ExportError(f"{path} does not exist; expected an ONNX file")
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker raises errors of its own and of protobuf
        raise ExportError(f"onnx.checker refuses {path.name}: {' '.join(str(error).split())}") from error


def read_input_ranges(path: Path, other: str | Path | None = None) -> Mapping[str, Any]:
    """The inputs that a file takes, as the export recorded them; those of ``other`` if ``path`` has no record.

    Raises:
        ExportError: neither has.
    """
    for candidate in (path, *([] if other is None else [Path(other)])):
        try:
            ranges: Mapping[str, Any] = read_metadata(InitializerFile(candidate).header, candidate.name)["inputs"]
            return ranges
        except ExportError:
            continue
    raise ExportError(f"{path.name} has no record of its inputs; expected a file that export_onnx wrote")


def draw_feeds(ranges: Mapping[str, Any], draws: int) -> list[tuple[str, Feeds]]:
    """Random inputs of the example's sizes, by case."""
    generator = torch.Generator().manual_seed(0)
    return [
        (f"random values {number}", {name: _draw(entry, generator) for name, entry in ranges.items()})
        for number in range(1, draws + 1)
    ]


def run_named(session: onnxruntime.InferenceSession, feeds: Feeds, case: str) -> Feeds:
    """The outputs by name.

    Raises:
        VerificationError: the file does not run.
    """
    names = [value.name for value in session.get_outputs()]
    try:
        return dict(zip(names, run_session(session, names, feeds), strict=True))
    except Exception as error:
        raise VerificationError(f"onnxruntime fails on {case}: {error}") from error


def _draw(entry: Mapping[str, Any], generator: torch.Generator) -> torch.Tensor:
    dtype: torch.dtype = getattr(torch, entry["dtype"])
    shape: list[int] = entry["shape"]
    low, high = float(entry["low"]), float(entry["high"])
    drawn = torch.rand(shape, generator=generator, dtype=torch.float64)
    is_flag = not dtype.is_floating_point and (low, high) == (0, 1)
    if is_flag:
        flags: torch.Tensor = drawn < _SHARE_OF_FLAGS
        if flags.dim() > 1:
            flags[..., 0] = True
        return flags.to(dtype)
    if dtype.is_floating_point:
        return (low + (high - low) * drawn).to(dtype)
    return torch.floor(low + (high - low + 1) * drawn).clamp(low, high).to(dtype)


def measure_values(case: str, name: str, found: torch.Tensor, want: torch.Tensor) -> OutputError:
    """The error of one output, however large; inf where the file gives nan or inf in place of a number."""
    found, exact = found.double(), want.double()
    finite = exact.isfinite()
    differences = (found - exact)[finite].abs().nan_to_num(nan=float("inf"))
    difference = float(differences.max()) if differences.numel() else 0.0
    largest = float(exact[finite].abs().max()) if differences.numel() else 0.0
    agreement = measure_argmax_agreement(found, exact)
    relative = difference / largest if largest else 0.0
    return OutputError(case=case, output=name, max_abs=difference, max_rel=relative, argmax_agreement=agreement)


def measure_within(limit: float, kind: str) -> Compare:
    """A comparison that accepts differences up to ``limit`` times the largest value of an output.

    Args:
        limit: the share.
        kind: what the file is quantized to, for the error.
    """

    def compare(case: str, name: str, found: torch.Tensor, want: torch.Tensor) -> OutputError:
        error = measure_values(case, name, found, want)
        if not error.max_rel <= limit:
            raise VerificationError(
                f"output {name} on {case}: the {kind} file differs by {error.max_rel:.1%} of its largest value, "
                f"accepted when it was quantized was {limit:.1%}; quantize the file of the present model again"
            )
        return error

    return compare
