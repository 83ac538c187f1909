"""The measurements of the demo."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import adapter_compiler as ac
from adapter_compiler.cli.demo.measure import Outcome
from adapter_compiler.cli.demo.training import Adaptation


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoResult:
    """The measurements on the test images.

    Attributes:
        upright: the pre-trained model on the task that it was trained on.
        before: the pre-trained model on the changed task.
        adapted: the model with adapters on the changed task.
        folded: the folded model on the changed task.
        exported: the exported ONNX file on onnxruntime, on the changed task.
        adaptation: the training of the adapters.
        export: the report of the export.
        base_seconds: median latency of the pre-trained model's ONNX file for one batch, in seconds.
        merged_seconds: the same for the exported file.
        picture: the picture of the ranks.
        page: the report of the run.
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
    page: Path
