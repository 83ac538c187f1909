"""Run an ONNX file on onnxruntime and compare every output with PyTorch."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import onnxruntime
import torch

from adapter_compiler.config.progress import tell
from adapter_compiler.errors import VerificationError
from adapter_compiler.onnx.verification.cases import VerificationCase
from adapter_compiler.onnx.verification.report import OutputError
from adapter_compiler.onnx.verification.sizes import Place
from adapter_compiler.onnx.verification.values import run_session
from passes.capture.calls import ModuleCall

logger = logging.getLogger(__name__)

#: Accepted |onnxruntime - PyTorch| is atol + rtol · max|PyTorch|: (rtol, atol) by dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-6, 1e-8),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (4e-2, 1e-2),
}

#: Computes PyTorch's outputs for a call, with their names in the file.
Reference = Callable[[ModuleCall], Sequence[tuple[str, torch.Tensor]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verification:
    """What a file was verified on.

    Attributes:
        errors: one entry for each output on each input.
        refused: the inputs that the model itself refuses.
    """

    errors: list[OutputError]
    refused: list[VerificationCase]

    @property
    def refused_places(self) -> frozenset[Place]:
        """The dimensions of which the model takes the example's size only, as far as other sizes were tried."""
        return frozenset[Place]().union(*(case.places for case in self.refused))


class MismatchError(VerificationError):
    """An output differs from PyTorch's.

    Attributes:
        tensors: the inputs of that call, on which the first node that differs can be looked for.
    """

    tensors: Sequence[torch.Tensor] = ()


def open_session(path: str | Path | bytes) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU, of a file or of its bytes.

    Raises:
        VerificationError: onnxruntime does not load the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised, there is no need to print them as well
    try:
        given = path if isinstance(path, bytes) else str(path)
        return onnxruntime.InferenceSession(given, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        name = "a model" if isinstance(path, bytes) else Path(path).name
        raise VerificationError(f"onnxruntime does not load {name}: {error}") from error


def verify_cases(
    session: onnxruntime.InferenceSession,
    cases: Iterable[VerificationCase],
    inputs: Sequence[str],
    reference: Reference,
    run_options: onnxruntime.RunOptions | None = None,
) -> Verification:
    """Compare a file with PyTorch on inputs.

    Args:
        session: the file, opened.
        cases: the inputs; the example, which comes first, must give finite values.
        inputs: names of the inputs, in the order of the call's tensors.
        reference: computes PyTorch's outputs.
        run_options: for onnxruntime, for example with an active adapter.

    Raises:
        VerificationError: the file does not run, or an output differs by more than the tolerance of its dtype.
    """
    errors: list[OutputError] = []
    refused: list[VerificationCase] = []
    seen: set[tuple[torch.Size, ...]] = set()
    for case in cases:
        tell(f"verify on {case.name}")
        usable = _find_usable_case(case, reference)
        if usable is None:
            refused.append(case)
            continue
        used, expected = usable
        shapes = tuple(tensor.shape for tensor in used.call.tensors)
        if used is not case and used.name != case.name and shapes in seen:
            continue  # two lengths that only change together
        seen.add(shapes)
        feeds = dict(zip(inputs, used.call.tensors, strict=True))
        try:
            errors += compare_outputs(session, used.name, feeds, expected, run_options)
        except MismatchError as error:
            error.tensors = used.call.tensors
            raise
    return Verification(errors=errors, refused=refused)


def _find_usable_case(
    case: VerificationCase, reference: Reference
) -> tuple[VerificationCase, Sequence[tuple[str, torch.Tensor]]] | None:
    """The case, or its first alternative that the model computes finite values for; the example is always used."""
    reasons: list[object] = []
    for candidate in (case, *case.alternatives):
        try:
            expected = reference(candidate.call)
        except Exception as error:  # the model's own code raises what it likes
            reasons.append(error)
            continue
        if not case.alternatives or not _has_empty_output(expected):
            return candidate, expected
        reasons.append("an output has no finite value")
    level = logging.INFO if case.places else logging.WARNING
    logger.log(level, "not verified on %s, because the model itself refuses it: %s", case.name, reasons[0])
    return None


def _has_empty_output(expected: Sequence[tuple[str, torch.Tensor]]) -> bool:
    return any(_has_no_finite_value(tensor) for _, tensor in expected)


def assert_comparable(case: str, name: str, exact: torch.Tensor) -> None:
    """Raise :class:`VerificationError` for an output without any finite value, which cannot be compared."""
    if _has_no_finite_value(exact):
        raise VerificationError(
            f"output {name} on {case}: PyTorch gives inf or nan only, so nothing can be compared; expected finite "
            "values; give an example for which the model computes them"
        )


def _has_no_finite_value(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and bool(tensor.numel()) and not bool(tensor.isfinite().any())


def compare_outputs(
    session: onnxruntime.InferenceSession,
    case: str,
    feeds: Mapping[str, torch.Tensor],
    expected: Sequence[tuple[str, torch.Tensor]],
    run_options: onnxruntime.RunOptions | None = None,
) -> list[OutputError]:
    """Errors of each output for one input.

    Args:
        session: the file, opened.
        case: the name of the input, for messages.
        feeds: the inputs by name; those that the file does not have, because they are unused, are left out.
        expected: PyTorch's outputs, named as in the file.
        run_options: for onnxruntime.

    Raises:
        VerificationError: the file does not run, or an output differs by more than the tolerance of its dtype.
    """
    try:
        found = run_session(session, [name for name, _ in expected], feeds, run_options)
    except Exception as error:
        raise VerificationError(f"onnxruntime fails on {case}: {error}") from error
    return [
        compare_values(case, name, value, want.detach().cpu())
        for (name, want), value in zip(expected, found, strict=True)
    ]


def compare_values(case: str, name: str, found: torch.Tensor, want: torch.Tensor) -> OutputError:
    """The error of one output.

    Raises:
        VerificationError: shapes differ, or values beyond the tolerance of the dtype.
    """
    if found.shape != want.shape:
        shapes = f"onnxruntime gives shape {tuple(found.shape)}, PyTorch {tuple(want.shape)}"
        raise MismatchError(f"output {name} on {case}: {shapes}")
    if not want.is_floating_point() or not want.numel():
        if not torch.equal(found.to(want.dtype), want):
            count = f"{int((found != want).sum())} of {want.numel()} values differ"
            raise MismatchError(f"output {name} on {case}: {count}")
        return OutputError(case=case, output=name, max_abs=0.0, max_rel=0.0)
    found, exact = found.to(torch.float64), want.to(torch.float64)
    assert_comparable(case, name, exact)
    finite = exact.isfinite()
    same_elsewhere = torch.equal(found[~finite].nan_to_num(), exact[~finite].nan_to_num())
    difference = float((found - exact)[finite].abs().max())
    largest = float(exact[finite].abs().max())
    rtol, atol = TOLERANCES[want.dtype]
    if not same_elsewhere or not difference <= atol + rtol * largest:
        raise MismatchError(
            f"output {name} on {case}: onnxruntime differs from PyTorch by {difference:.3g} (values up to "
            f"{largest:.3g}), accepted is {atol + rtol * largest:.3g} for {want.dtype}"
            + ("" if same_elsewhere else "; inf or nan are in different places")
        )
    return OutputError(
        case=case,
        output=name,
        max_abs=difference,
        max_rel=difference / largest if largest else 0.0,
        argmax_agreement=measure_argmax_agreement(found, exact),
    )


def measure_argmax_agreement(found: torch.Tensor, exact: torch.Tensor) -> float | None:
    """Share of rows whose largest value is in the same place; ``None`` for values without rows."""
    if exact.dim() < 2 or exact.shape[-1] < 2 or not exact.numel():
        return None
    return float((found.argmax(-1) == exact.argmax(-1)).double().mean())
