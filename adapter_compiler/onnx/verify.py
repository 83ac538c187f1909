"""Run an ONNX file on onnxruntime and compare every output with PyTorch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import onnxruntime
import torch

from adapter_compiler.errors import VerificationError

if TYPE_CHECKING:
    from adapter_compiler.adapted import FoldReport

#: Accepted |onnxruntime - PyTorch| is atol + rtol · max|PyTorch|: (rtol, atol) by dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-6, 1e-8),
    torch.float32: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (4e-2, 1e-2),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OutputError:
    """How far one output is from PyTorch's on one input.

    Attributes:
        case: the input: ``example``, ``batch 5``, ``dimension 1 of size 9``.
        output: the output's name.
        max_abs: largest absolute difference.
        max_rel: the same over the largest absolute value that PyTorch gives.
    """

    case: str
    output: str
    max_abs: float
    max_rel: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """What was exported and how it was checked.

    Attributes:
        path: the ONNX file.
        inputs: names of its inputs, in the order of the call's tensors.
        outputs: names of its outputs, in the order of the model's.
        dynamic: symbolic dimensions: ``"all"`` that the model allows, ``"first"`` of each tensor, or ``"none"``.
        dynamic_axes: the dimensions left open, by input.
        opset: the ONNX operator set.
        errors: one entry for each output of each input the file was verified on.
        not_verified: inputs the file could not be compared on, because the model itself refuses them.
        fold: rounding errors of the fold, if adapters were folded.
    """

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    dynamic: str
    dynamic_axes: Mapping[str, tuple[int, ...]]
    opset: int
    errors: tuple[OutputError, ...]
    not_verified: tuple[str, ...]
    fold: FoldReport | None

    @property
    def max_abs_error(self) -> float:
        """Largest absolute difference between onnxruntime and PyTorch over all checks."""
        return max((error.max_abs for error in self.errors), default=0.0)

    @property
    def cases(self) -> tuple[str, ...]:
        """The inputs the file was verified on."""
        return tuple(dict.fromkeys(error.case for error in self.errors))


def open_session(path: str | Path) -> onnxruntime.InferenceSession:
    """An onnxruntime session on the CPU.

    Raises:
        VerificationError: onnxruntime does not load the file.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise VerificationError(f"onnxruntime does not load {Path(path).name}: {error}") from error


def compare_outputs(
    session: onnxruntime.InferenceSession,
    case: str,
    feeds: Mapping[str, torch.Tensor],
    expected: Sequence[tuple[str, torch.Tensor]],
) -> list[OutputError]:
    """Errors of each output for one input.

    Args:
        session: the file, opened.
        case: what to call the input.
        feeds: the inputs by name; those that the file has dropped as unused are left out.
        expected: PyTorch's outputs, named as in the file.

    Raises:
        VerificationError: the file does not run, or an output departs beyond the tolerance of its dtype.
    """
    wanted = {value.name for value in session.get_inputs()}
    arrays = {name: tensor.detach().cpu().numpy() for name, tensor in feeds.items() if name in wanted}
    try:
        found = session.run([name for name, _ in expected], arrays)
    except Exception as error:
        raise VerificationError(f"onnxruntime fails on {case}: {error}") from error
    return [
        _compare(case, name, torch.from_numpy(array), want.detach().cpu())
        for (name, want), array in zip(expected, found, strict=True)
    ]


def _compare(case: str, name: str, found: torch.Tensor, want: torch.Tensor) -> OutputError:
    if found.shape != want.shape:
        raise VerificationError(
            f"output {name} on {case}: onnxruntime gives shape {tuple(found.shape)}, PyTorch {tuple(want.shape)}"
        )
    if not want.is_floating_point() or not want.numel():
        if not torch.equal(found.to(want.dtype), want):
            raise VerificationError(
                f"output {name} on {case}: {int((found != want).sum())} of {want.numel()} values differ"
            )
        return OutputError(case=case, output=name, max_abs=0.0, max_rel=0.0)
    found, exact = found.to(torch.float64), want.to(torch.float64)
    finite = exact.isfinite()
    if not bool(finite.any()):
        raise VerificationError(
            f"output {name} on {case}: PyTorch gives inf or nan only, so nothing can be compared; expected finite "
            "values; give an example for which the model computes them"
        )
    same_elsewhere = torch.equal(found[~finite].nan_to_num(), exact[~finite].nan_to_num())
    difference = float((found - exact)[finite].abs().max())
    largest = float(exact[finite].abs().max())
    rtol, atol = TOLERANCES[want.dtype]
    if not same_elsewhere or not difference <= atol + rtol * largest:
        raise VerificationError(
            f"output {name} on {case}: onnxruntime departs from PyTorch by {difference:.3g} (values up to "
            f"{largest:.3g}), accepted is {atol + rtol * largest:.3g} for {want.dtype}"
            + ("" if same_elsewhere else "; inf or nan stand in different places")
        )
    return OutputError(case=case, output=name, max_abs=difference, max_rel=difference / largest if largest else 0.0)
