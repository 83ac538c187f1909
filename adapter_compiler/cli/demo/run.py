"""Run the demo, from its data to its files."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import nn

import adapter_compiler as ac
from adapter_compiler.cli.demo.data import LabeledImages, load_digits, rotate_and_invert
from adapter_compiler.cli.demo.measure import (
    Outcome,
    assert_same_accuracy,
    judge,
    measure_latency,
    run_in_pytorch,
    run_on_onnxruntime,
)
from adapter_compiler.cli.demo.options import DemoOptions
from adapter_compiler.cli.demo.result import DemoResult
from adapter_compiler.cli.demo.show import show_files, show_result, show_task
from adapter_compiler.cli.demo.training import BATCH_SIZE, Adaptation, Watcher, adapt, pretrain
from adapter_compiler.config.progress import silence
from adapter_compiler.errors import ConfigError


def run_demo(options: DemoOptions, console: Console) -> DemoResult:
    """Pre-train, change the task, adapt, fold, export and verify; print the progress on ``console``.

    Raises:
        ConfigError: the folder ``options.out`` cannot be created.
        MissingDependencyError: scikit-learn is not installed.
        VerificationError: the folded or exported model differs from the adapted one in accuracy.
    """
    start = time.perf_counter()
    _make_folder(options.out)
    upright, upright_test = load_digits(options.seed)
    changed, changed_test = rotate_and_invert(upright), rotate_and_invert(upright_test)
    show_task(console, upright, upright_test)
    with _one_thread(), _progress_bars(console) as bars, silence():
        base = pretrain(upright, options, _add_bar(bars, "pre-training", options.pretraining_steps))
        first = judge(run_in_pytorch(base, upright_test.images), upright_test)
        before = judge(run_in_pytorch(base, changed_test.images), changed_test)
        adaptation = adapt(base, changed, options, _add_bar(bars, "AdaLoRA", options.steps))
    with console.status("fold, export, verify on onnxruntime"), silence():
        result = _finish(base, adaptation, changed_test, options, first, before)
    show_result(console, result)
    assert_same_accuracy(result.adapted, result.folded, result.exported)
    show_files(console, result, time.perf_counter() - start)
    return result


def _finish(
    base: nn.Module,
    adaptation: Adaptation,
    test: LabeledImages,
    options: DemoOptions,
    upright: Outcome,
    before: Outcome,
) -> DemoResult:
    """Fold, export and measure; the base model is exported only to measure its latency."""
    adapted = judge(run_in_pytorch(adaptation.model, test.images), test)
    folded = judge(run_in_pytorch(adaptation.model.fold(), test.images), test)
    batch = test.images[:BATCH_SIZE]
    export = ac.export_onnx(adaptation.model, options.out / "model.onnx", (batch,))
    with tempfile.TemporaryDirectory() as folder:
        unadapted = ac.export_onnx(base, Path(folder) / "base.onnx", (batch,))
        base_seconds, merged_seconds = measure_latency([unadapted.path, export.path], batch)
    return DemoResult(
        upright=upright,
        before=before,
        adapted=adapted,
        folded=folded,
        exported=judge(run_on_onnxruntime(export.path, test.images), test),
        adaptation=adaptation,
        export=export,
        base_seconds=base_seconds,
        merged_seconds=merged_seconds,
        picture=_draw(adaptation, options),
        page=_write_page(adaptation, export, options),
    )


def _draw(adaptation: Adaptation, options: DemoOptions) -> Path:
    return ac.plot_ranks(
        adaptation.budget.history,
        options.out / "report.png",
        initial_triplets=adaptation.initial_triplets,
        losses=adaptation.losses,
        title=f"AdaLoRA on rotated and inverted digits: rank {options.rank} to {options.target_rank:g} on average",
    )


def _write_page(adaptation: Adaptation, export: ac.ExportReport, options: DemoOptions) -> Path:
    return adaptation.budget.report(
        options.out / "report.html",
        losses=adaptation.losses,
        export=export,
        title=f"AdaLoRA on rotated and inverted digits: rank {options.rank} to {options.target_rank:g} on average",
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"out={str(folder)!r} cannot be created ({error.strerror}), expected a folder for model.onnx, "
            "report.html and report.png; give one that can be written"
        ) from error


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A context in which torch uses one thread.

    With matrices this small, synchronizing threads costs more than they gain. The results also do not depend on the
    number of cores.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _progress_bars(console: Console) -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bars:
        yield bars


def _add_bar(bars: Progress, description: str, steps: int) -> Watcher:
    task = bars.add_task(description, total=steps, note="")

    def watch(loss: float, live: int | None) -> None:
        triplets = "" if live is None else f", {live} triplets live"
        bars.update(task, advance=1, note=f"loss {loss:.3f}{triplets}")

    return watch
