"""How LoRA, DoRA and full fine-tuning change weights in length and direction over training, as DoRA's paper plots it.

    ./run python -m benchmarks.weight_changes --picture changes.png

A small vision transformer that has learned scikit-learn's digits is adapted to 200 that are rotated and inverted, each
way at its best rate of docs/quality.md, for 50, 100 and 150 steps; each is a run with a schedule of its own. Prints the
mean changes of the weights and the correlation of both over them (arXiv 2402.09353, section 3.2), and draws the points
of the shortest and the longest runs.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import adapter_compiler as ac
from benchmarks.quality.building import build_run
from benchmarks.quality.methods import METHODS
from benchmarks.quality.tasks import get_steps, make_task
from benchmarks.quality.tasks.base import draw_batches, measure
from benchmarks.quality.training import train

TASK, RATES = "digits_coarse", {"full": 2.5e-3, "lora": 6.4e-3, "dora": 1.6e-2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--picture", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    task, steps = make_task(TASK, 0, 0), get_steps(TASK)
    names = tuple(name for name, p in task.model.named_parameters() if name.startswith("blocks.") and p.dim() == 2)
    points: dict[str, Any] = {}
    print("| way | steps | change of length | change of direction | correlation | accuracy |")
    print("|---|---:|---:|---:|---:|---:|")
    for way, rate in RATES.items():
        for part in (1, 2, 3):
            count = steps * part // 3
            batches = draw_batches(task.train, count, task.batch_size, 0)
            run = build_run(METHODS[way], task, batches, rank=2, rate=rate, seed=0)
            train(task, [run], [batches])
            base = None if isinstance(run.model, ac.AdaptedModel) else task.model
            found = ac.measure_weight_changes(run.model, base, weights=names)
            if part != 2:  # the picture tells six colors apart
                points[f"{way}, {count} steps"] = found
            both = torch.tensor([[one.magnitude, one.direction] for one in found.values()])
            length, direction = both.mean(0).tolist()
            accuracy = measure(task, run.model, task.test)
            correlation = float(torch.corrcoef(both.T)[0, 1])
            print(
                f"| {way} | {count} | {length:.3f} | {direction:.4f} | {correlation:+.2f} | {accuracy:.1f} |",
                flush=True,
            )
    if options.picture is not None:
        ac.plot_weight_changes(points, options.picture, title="blocks of a vision transformer")


if __name__ == "__main__":
    main()
