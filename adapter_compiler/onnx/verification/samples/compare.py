"""Compare a file with PyTorch on the user's data: errors, argmax agreement, and the user's metric of both."""

from __future__ import annotations

import dataclasses
import numbers
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnxruntime
import torch

from adapter_compiler.config.progress import tell
from adapter_compiler.errors import ConfigError, VerificationError
from adapter_compiler.onnx.verification.report import OutputError, SampleError, SampleMetric, SampleReport
from adapter_compiler.onnx.verification.samples.read import Sample, Samples
from adapter_compiler.onnx.verification.values import run_session
from adapter_compiler.onnx.verification.verify import MismatchError, compare_values
from passes.capture.calls import ModuleCall

#: ``metric(outputs, batch)``: the outputs by name and the whole batch, to a number, or to numbers by name.
Metric = Callable[[Mapping[str, torch.Tensor], Any], Any]
#: Computes the outputs for a call, by name.
Run = Callable[[ModuleCall], Mapping[str, torch.Tensor]]
#: The error of one output from case, name, found and wanted values; it raises if that is not accepted.
Compare = Callable[[str, str, torch.Tensor, torch.Tensor], OutputError]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleCheck:
    """What to verify files on besides the example.

    Attributes:
        samples: the user's data.
        metric: what to measure on both sides.
    """

    samples: Samples
    metric: Metric | None = None

    def compare(
        self, run: Run, reference: Run, *, subject: str = "", source: str = "PyTorch", compare: Compare = compare_values
    ) -> SampleReport:
        """Run both on every batch.

        Args:
            run: the file.
            reference: what it should give.
            subject: what of the file is compared, for the report, as in ``adapter active``.
            source: the name of the reference.
            compare: the error of one output.

        Raises:
            ConfigError: a batch does not fit, or the metric fails or gives no number.
            VerificationError: a file does not run on a batch, or an output differs by more than is accepted.
        """
        sums, batches, rows = _Sums(), 0, 0
        scores: tuple[dict[str, float], dict[str, float]] = ({}, {})
        for sample in self.samples:
            tell(f"verify on {sample.name}")
            expected = reference(sample.call)
            found = _run_on(run, sample)
            try:
                for name, want in expected.items():
                    sums.add(compare(_spell(sample, subject), name, found[name], want), found[name], want)
            except MismatchError as error:
                error.tensors = sample.call.tensors
                raise
            measured = [self._measure(outputs, sample) for outputs in (expected, found)]
            _assert_same_names(measured, scores[0] if batches else None, sample)
            for values, total in zip(measured, scores, strict=True):
                for name, value in values.items():
                    total[name] = total.get(name, 0.0) + value * sample.rows
            batches, rows = batches + 1, rows + sample.rows
        metrics = [
            SampleMetric(name=name, reference=total / rows, found=scores[1][name] / rows)
            for name, total in (scores[0].items() if rows else ())
        ]
        return SampleReport(
            subject=subject,
            reference=source,
            batches=batches,
            rows=rows,
            errors=tuple(sums.finish()),
            metrics=tuple(metrics),
            not_given=tuple(self.samples.not_given),
        )

    def _measure(self, outputs: Mapping[str, torch.Tensor], sample: Sample) -> dict[str, float]:
        if self.metric is None:
            return {}
        name = getattr(self.metric, "__name__", type(self.metric).__name__)
        try:
            result = self.metric(dict(outputs), sample.batch)
        except Exception as error:  # the user's own code
            raise ConfigError(
                f"the metric {name} fails on {sample.name}: {type(error).__name__}: {error}; it is called as "
                f"metric(outputs, batch), where outputs is a dict of tensors with the keys {', '.join(outputs)}"
            ) from error
        values = dict(result) if isinstance(result, Mapping) else {name: result}
        return {str(key): _to_number(key, value, sample) for key, value in values.items()}


def make_check(samples: Any, metric: Metric | None, example: ModuleCall) -> SampleCheck | None:
    """The check that a user's options ask for; ``None`` without samples.

    Raises:
        ConfigError: there is a metric without samples, it is no function, or the samples do not fit the example.
    """
    if metric is not None and samples is None:
        raise ConfigError("metric= is given without samples=, expected data to measure it on; give samples= as well")
    return None if samples is None else SampleCheck(samples=Samples(samples, example), metric=metric)


def run_reference(reference: Callable[[ModuleCall], Sequence[tuple[str, torch.Tensor]]]) -> Run:
    """PyTorch's outputs on the CPU, from a function that gives them with their names.

    A batch that the model itself refuses is a :class:`ConfigError`.
    """

    def run(call: ModuleCall) -> Mapping[str, torch.Tensor]:
        try:
            return {name: tensor.detach().cpu() for name, tensor in reference(call)}
        except Exception as error:  # the model's own code raises what it likes
            shapes = ", ".join(
                f"{name} {list(tensor.shape)}" for name, tensor in zip(call.names, call.tensors, strict=True)
            )
            raise ConfigError(
                f"the model itself refuses a batch of samples= with {shapes}: {type(error).__name__}: {error}; give "
                "batches that the model runs on in eval mode"
            ) from error

    return run


def run_file(
    session: onnxruntime.InferenceSession,
    inputs: Sequence[str],
    further: Mapping[str, torch.Tensor] | None = None,
) -> Run:
    """The outputs of a file, by name.

    Args:
        session: the file, opened.
        inputs: names of the inputs, in the order of a call's tensors.
        further: what the file gets besides, such as adapters.
    """
    names = [value.name for value in session.get_outputs()]

    def run(call: ModuleCall) -> Mapping[str, torch.Tensor]:
        feeds = {**dict(zip(inputs, call.tensors, strict=True)), **(further or {})}
        return dict(zip(names, run_session(session, names, feeds), strict=True))

    return run


def _run_on(run: Run, sample: Sample) -> Mapping[str, torch.Tensor]:
    try:
        return run(sample.call)
    except VerificationError:
        raise
    except Exception as error:  # onnxruntime raises plain RuntimeErrors, and types of its own
        shapes = ", ".join(
            f"{name} {list(tensor.shape)}" for name, tensor in zip(sample.call.names, sample.call.tensors, strict=True)
        )
        raise VerificationError(
            f"onnxruntime fails on {sample.name} ({shapes}): {' '.join(str(error).split())}; if that is for a size "
            "that the file does not leave open, as of a smaller last batch, leave it out (DataLoader(drop_last=True))"
        ) from error


def _spell(sample: Sample, subject: str) -> str:
    return f"{sample.name}, {subject}" if subject else sample.name


def _assert_same_names(
    measured: Sequence[Mapping[str, float]], earlier: Mapping[str, float] | None, sample: Sample
) -> None:
    """Raise :class:`ConfigError` if the metric gives other numbers for one side, or on one batch."""
    for names in (measured[0].keys(), *([] if earlier is None else [earlier.keys()])):
        if odd := sorted(names ^ measured[1].keys()):
            raise ConfigError(
                f"the metric gives {odd[0]!r} on {sample.name} for one side or batch only, expected the same names for "
                "PyTorch and the file on every batch, whose values are averaged; return nan where a value is undefined"
            )


def _to_number(name: object, value: Any, sample: Sample) -> float:
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    is_number = isinstance(value, numbers.Real) or getattr(value, "shape", None) == ()
    if not is_number:
        raise ConfigError(
            f"the metric gives a {type(value).__name__} for {name} on {sample.name}, expected a number; it is averaged "
            "over the batches by their rows"
        )
    return float(value)


class _Sums:
    """Errors of each output over the batches."""

    def __init__(self) -> None:
        self._errors: dict[str, list[OutputError]] = {}
        self._absolute: defaultdict[str, float] = defaultdict(float)
        self._values: defaultdict[str, int] = defaultdict(int)
        self._agreeing: defaultdict[str, float] = defaultdict(float)
        self._rows: defaultdict[str, int] = defaultdict(int)

    def add(self, error: OutputError, found: torch.Tensor, want: torch.Tensor) -> None:
        name = error.output
        self._errors.setdefault(name, []).append(error)
        exact, other = want.double(), found.double()
        finite = exact.isfinite()
        self._absolute[name] += float((other - exact)[finite].abs().sum())
        self._values[name] += int(finite.sum())
        if error.argmax_agreement is not None:
            rows = want.numel() // want.shape[-1]
            self._agreeing[name] += error.argmax_agreement * rows
            self._rows[name] += rows

    def finish(self) -> list[SampleError]:
        return [
            SampleError(
                output=name,
                max_abs=max(error.max_abs for error in errors),
                mean_abs=self._absolute[name] / self._values[name] if self._values[name] else 0.0,
                max_rel=max(error.max_rel for error in errors),
                argmax_agreement=self._agreeing[name] / self._rows[name] if self._rows[name] else None,
            )
            for name, errors in self._errors.items()
        ]
