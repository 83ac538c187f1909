"""The demo as a user runs it: a short run through the command line."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.image
import onnx
import pytest
import torch
from typer.testing import CliRunner

from adapter_compiler.cli.demo import run
from adapter_compiler.cli.demo.data import load_digits, rotate_and_invert
from adapter_compiler.cli.demo.measure import judge, measure_latency, run_on_onnxruntime
from adapter_compiler.cli.demo.result import DemoResult
from adapter_compiler.cli.main import app

pytestmark = pytest.mark.slow


@dataclasses.dataclass(frozen=True)
class ShortRun:
    """The result and the files of a run."""

    folder: Path
    output: str
    result: DemoResult


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShortRun]:
    folder = tmp_path_factory.mktemp("demo") / "new" / "folder"
    kept: list[DemoResult] = []
    finish = run._finish

    def finish_and_keep(*arguments: Any) -> DemoResult:
        kept.append(finish(*arguments))
        return kept[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "_finish", finish_and_keep)
        patch.setattr(run, "measure_latency", functools.partial(measure_latency, repeats=3))
        arguments = ["demo", "--out", str(folder), "--seed", "3", "--steps", "60", "--pretraining-steps", "120"]
        answer = CliRunner().invoke(app, arguments, env={"COLUMNS": "100"})
    assert answer.exit_code == 0, answer.output
    yield ShortRun(folder, answer.output, kept[0])


def test_it_writes_a_model_with_the_accuracy_that_it_prints(short_run: ShortRun) -> None:
    assert sorted(file.name for file in short_run.folder.iterdir()) == ["model.onnx", "report.html", "report.png"]
    path = short_run.folder / "model.onnx"
    onnx.checker.check_model(str(path), full_check=True)
    test = rotate_and_invert(load_digits(3)[1])
    accuracy = judge(run_on_onnxruntime(path, test.images), test).accuracy
    printed = re.findall(r"changed digits, (.+?) +│ +([\d.]+)%", short_run.output)
    assert [name for name, _ in printed] == ["before", "after AdaLoRA", "after folding", "on onnxruntime"]
    assert {value for _, value in printed[1:]} == {f"{accuracy:.1%}"[:-1]}


def test_training_on_the_changed_task_helps(short_run: ShortRun) -> None:
    result = short_run.result
    assert result.upright.accuracy > 0.3
    assert result.adapted.accuracy > result.before.accuracy + 0.05
    assert result.adaptation.losses[-1] < result.adaptation.losses[0]


def test_it_prints_what_was_trained_and_pruned(short_run: ShortRun) -> None:
    model = short_run.result.adaptation.model
    trained = sum(p.numel() for p in model.trainable_parameters())
    total = sum(p.numel() for p in model.module.parameters())
    assert f"{trained:,} ({trained / total:.1%} of {total:,})" in short_run.output
    assert "78 → 52 triplets" in short_run.output
    assert "2.00 on average" in short_run.output
    assert re.search(r"latency for 64 images on onnxruntime, merged +│ +\d+\.\d\d ms", short_run.output)
    assert re.search(r"compared with PyTorch on: example, batch 65\b", short_run.output)


def test_the_picture_is_one(short_run: ShortRun) -> None:
    height, width, _ = matplotlib.image.imread(short_run.folder / "report.png").shape
    assert width > height > 400


def test_the_report_is_about_this_run(short_run: ShortRun) -> None:
    text = (short_run.folder / "report.html").read_text()
    assert "The budget pruned 26 of 78 triplets (33%), to an average rank of 2.00" in text
    assert "The exported file on onnxruntime against PyTorch" in text


def test_it_fails_if_the_exported_model_is_worse(
    short_run: ShortRun, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The slow parts return their earlier results, and the exported model classifies nothing correctly."""
    result = short_run.result
    broken = dataclasses.replace(result, exported=dataclasses.replace(result.exported, correct=0))
    monkeypatch.setattr(run, "pretrain", lambda *_: torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10)))
    monkeypatch.setattr(run, "adapt", lambda *_: result.adaptation)
    monkeypatch.setattr(run, "_finish", lambda *_: broken)
    answer = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert answer.exit_code == 1
    assert "0.0%" in answer.stdout
    assert "wrote" not in answer.stdout
    assert re.fullmatch(r"error: of 599 images .*the exported model 0; expected equal numbers\. .*\n", answer.stderr)
