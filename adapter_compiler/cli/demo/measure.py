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
    """The result of running a model in one way.

    Attributes:
        logits: [n, 10].
        correct: the number of images that are classified correctly.
        images: n.
    """

    logits: torch.Tensor
    correct: int
    images: int

    @property
    def accuracy(self) -> float:
        """The share of images that are classified correctly."""
        return self.correct / self.images


def judge(logits: torch.Tensor, digits: LabeledImages) -> Outcome:
    """Count the correct classifications."""
    correct = int((logits.argmax(dim=1) == digits.labels).sum())
    return Outcome(logits=logits, correct=correct, images=len(digits))


def find_largest_error(first: Outcome, second: Outcome) -> float:
    """The largest absolute difference between the logits of two outcomes."""
    return float((first.logits.double() - second.logits.double()).abs().max())


def assert_same_accuracy(adapted: Outcome, folded: Outcome, exported: Outcome) -> None:
    """Raise :class:`VerificationError` unless all three classify the same number of images correctly."""
    if not adapted.correct == folded.correct == exported.correct:
        raise VerificationError(
            f"of {adapted.images} images the adapted model classifies {adapted.correct} correctly, the folded model "
            f"{folded.correct}, the exported model {exported.correct}; expected equal numbers. Folding or export "
            "changed the model; please report this with the seed and the versions of torch and onnxruntime"
        )


def measure_latency(paths: Sequence[Path], images: torch.Tensor, repeats: int = 100) -> list[float]:
    """The median time of one call on onnxruntime for each file, in seconds.

    Calls of the files alternate, so that a change in the machine's load affects all of them.

    Args:
        paths: the exported models.
        images: the batch for each call.
        repeats: the number of timed calls for each file.
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
