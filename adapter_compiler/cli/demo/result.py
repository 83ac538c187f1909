"""What the demo measures."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import adapter_compiler as ac
from adapter_compiler.cli.demo.measure import Outcome
from adapter_compiler.cli.demo.training import Adaptation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """What was measured on the held-out images.

    Attributes:
        upright: the pre-trained model on the task it was trained for.
        before: the same model on the changed task.
        adapted: the model with adapters on the changed task.
        folded: the plain model that the adapters were merged into.
        exported: the ONNX file of that on onnxruntime.
        adaptation: the training.
        export: the exporter's own checks.
        base_seconds: median latency of the pre-trained model's ONNX file for one batch.
        merged_seconds: the same of the merged model's file, measured in turns with it.
        picture: the plot of the ranks.
    """

    upright: Outcome
    before: Outcome
    adapted: Outcome
    folded: Outcome
    exported: Outcome
    adaptation: Adaptation
    export: ac.ExportReport
    base_seconds: float
    merged_seconds: float
    picture: Path
