"""Accuracy, differences and latency of a model in PyTorch and on onnxruntime."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn

from adapter_compiler.cli.demo.data import LabeledImages
from adapter_compiler.errors import VerificationError
from adapter_compiler.onnx.verification.verify import open_session


def run_in_pytorch(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Logits [n, 10] of a model in eval mode."""
    with torch.no_grad():
        logits: torch.Tensor = model(images)
    return logits


def run_on_onnxruntime(path: Path, images: torch.Tensor) -> torch.Tensor:
    """Logits [n, 10] of an exported model."""
    session = open_session(path)
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    return torch.from_numpy(logits)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What one way of running a model gave.

    Attributes:
        logits: [n, 10].
        correct: how many images it names right.
        images: n.
    """

    logits: torch.Tensor
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        """Share of images named right."""
        return self.correct / self.images


def judge(logits: torch.Tensor, digits: LabeledImages) -> Outcome:
    """Count right answers."""
    correct = int((logits.argmax(dim=1) == digits.labels).sum())
    return Outcome(logits=logits, correct=correct, images=len(digits))


def find_largest_error(first: Outcome, second: Outcome) -> float:
    """Largest absolute difference between two outcomes' logits."""
    return float((first.logits.double() - second.logits.double()).abs().max())


def assert_same_accuracy(adapted: Outcome, folded: Outcome, exported: Outcome) -> None:
    """Raise :class:`VerificationError` unless all three name the same number of images right."""
    if not adapted.correct == folded.correct == exported.correct:
        raise VerificationError(
            f"of {adapted.images} images the adapted model names {adapted.correct} right, the folded one "
            f"{folded.correct}, the exported one {exported.correct}; expected equal numbers. Folding or export "
            "changed the model; please report this with the seed and the versions of torch and onnxruntime"
        )


def measure_latency(paths: Sequence[Path], images: torch.Tensor, repeats: int = 100) -> list[float]:
    """Median seconds of one call on onnxruntime for each file, measured in turns so that all see the same machine.

    Args:
        paths: the exported models.
        images: what each is called on.
        repeats: calls of each file that count.
    """
    sessions = [open_session(path) for path in paths]
    feeds = [{session.get_inputs()[0].name: images.numpy()} for session in sessions]
    calls = list(zip(sessions, feeds, strict=True))
    for session, feed in calls:
        _time_call(session, feed)
    seconds: list[list[float]] = [[] for _ in calls]
    for turn in range(repeats):
        order = range(len(calls)) if turn % 2 else reversed(range(len(calls)))
        for i in order:
            seconds[i].append(_time_call(*calls[i]))
    return [statistics.median(times) for times in seconds]


def _time_call(session: onnxruntime.InferenceSession, feed: dict[str, Any]) -> float:
    start = time.perf_counter()
    session.run(None, feed)
    return time.perf_counter() - start
