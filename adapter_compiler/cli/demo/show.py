"""The text that the demo prints."""

from __future__ import annotations

import statistics

import torch
from rich.console import Console
from rich.table import Table

from adapter_compiler.cli.demo.data import LabeledImages, rotate_and_invert
from adapter_compiler.cli.demo.measure import Outcome, find_largest_error
from adapter_compiler.cli.demo.result import DemoResult
from adapter_compiler.cli.demo.training import BATCH_SIZE

_SHADES = " ░▒▓█"


def show_task(console: Console, train: LabeledImages, test: LabeledImages) -> None:
    """Print a description of both tasks, and one image of each."""
    console.print(
        f"A small vision transformer learns handwritten digits ({len(train):,} images for training, {len(test):,} for "
        "testing). Then the task changes: every digit is rotated by 90° and inverted."
    )
    shown = LabeledImages(images=train.images[:1], labels=train.labels[:1])
    pair = zip(_draw(shown.images[0]), _draw(rotate_and_invert(shown).images[0]), strict=True)
    arrow = f"{int(shown.labels[0])} →"
    lines = [f"    {left}  {arrow if i == 4 else '':^7}  {right}" for i, (left, right) in enumerate(pair)]
    console.print("", *lines, "", sep="\n", highlight=False)


def show_result(console: Console, result: DemoResult) -> None:
    """Print all measurements as one table."""
    table = Table(show_header=False)
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row(f"[bold]accuracy on {result.before.images} test images", "")
    for name, outcome in (
        ("upright digits, pre-trained model", result.upright),
        ("changed digits, before", result.before),
        ("changed digits, after AdaLoRA", result.adapted),
        ("changed digits, after folding", result.folded),
        ("changed digits, on onnxruntime", result.exported),
    ):
        table.add_row(f"  {name}", _percent(outcome))
    table.add_section()
    _add_training(table, result)
    table.add_section()
    table.add_row("largest error of folding", f"{find_largest_error(result.adapted, result.folded):.1e}")
    table.add_row("largest error on onnxruntime", f"{find_largest_error(result.folded, result.exported):.1e}")
    table.add_row("largest logit", f"{float(result.adapted.logits.abs().max()):.1f}")
    table.add_section()
    table.add_row(f"latency for {BATCH_SIZE} images on onnxruntime, before", f"{result.base_seconds * 1e3:.2f} ms")
    table.add_row(f"latency for {BATCH_SIZE} images on onnxruntime, merged", f"{result.merged_seconds * 1e3:.2f} ms")
    console.print(table)


def show_files(console: Console, result: DemoResult, seconds: float) -> None:
    """Print the paths of the files, how the model was verified, and the total time."""
    checked = ", ".join(result.export.cases)
    console.print(f"wrote {result.export.path} (compared with PyTorch on: {checked})", soft_wrap=True, highlight=False)
    console.print(f"wrote {result.page}", soft_wrap=True, highlight=False)
    console.print(f"wrote {result.picture}", soft_wrap=True, highlight=False)
    console.print(f"done in {seconds:.0f} s", highlight=False)


def _add_training(table: Table, result: DemoResult) -> None:
    report, budget = result.adaptation.model.report(), result.adaptation.budget
    ranks = list(budget.ranks().values())
    share = f"{report.trainable_share:.1%} of {report.total_parameters:,}"
    spread = f"{min(ranks)} to {max(ranks)}, {statistics.mean(ranks):.2f} on average"
    table.add_row("trained values", f"{report.trainable_parameters:,} ({share})")
    table.add_row("rank budget", f"{result.adaptation.initial_triplets} → {budget.live_triplets} triplets")
    table.add_row(f"rank of the {len(ranks)} weights", spread)


def _percent(outcome: Outcome) -> str:
    return f"{outcome.accuracy:.1%}"


def _draw(image: torch.Tensor) -> list[str]:
    """An image as text: two characters for each pixel, one line for each row."""
    levels = (image * (len(_SHADES) - 1)).round().int().tolist()
    return ["".join(2 * _SHADES[level] for level in row) for row in levels]
