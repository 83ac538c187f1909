"""Train several runs of one method together: forward and backward of all by ``torch.vmap``, steps one after another.

The models, optimizers and budgets are the users' own; only the gradients are computed for all runs at once. A test
compares them with those that each run computes by itself.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.quality.building import Run
from benchmarks.quality.tasks.base import Examples, Task

_Tensors = dict[str, Tensor]


def train(task: Task, runs: Sequence[Run], batches: Sequence[Sequence[Examples]]) -> None:
    """Train all runs, each on its own batches; the rate warms up over a tenth of the steps and decays to zero.

    Args:
        task: the task of the first run; all have models of one shape.
        runs: the runs.
        batches: the batches of each run.
    """
    peaks = [[group["lr"] for group in run.optimizer.param_groups] for run in runs]
    steps = len(batches[0])
    for step in range(steps):
        share = find_share(step, steps)
        for run, peak in zip(runs, peaks, strict=True):
            for group, rate in zip(run.optimizer.param_groups, peak, strict=True):
                group["lr"] = rate * share
        write_gradients(task, runs, [own[step] for own in batches])
        for run in runs:
            run.optimizer.step()
            run.after_step(step)


def find_share(step: int, steps: int) -> float:
    """OneCycle's share of the peak rate: from 1/25 up over a tenth of the steps, then down to zero, by cosines."""
    up = max(1.0, steps / 10 - 1)
    if step <= up:
        return 1 - 0.96 * (1 + math.cos(math.pi * step / up)) / 2
    return (1 + math.cos(math.pi * (step - up) / (steps - 1 - up))) / 2


def write_gradients(task: Task, runs: Sequence[Run], batches: Sequence[Examples]) -> None:
    """Compute the gradients of all runs, each on its own batch."""
    if len(runs) == 1:
        return _write_one(task, runs[0], batches[0])
    trained = [{n: p for n, p in run.model.named_parameters() if p.requires_grad} for run in runs]
    frozen = [{n: p for n, p in run.model.named_parameters() if not p.requires_grad} for run in runs]
    first = runs[0]

    def find_loss(own: _Tensors, others: _Tensors, inputs: _Tensors, labels: Tensor) -> Tensor:
        loss = task.loss(functional_call(first.model, {**own, **others}, (), inputs), labels)
        return loss if first.penalty is None else loss + first.penalty(own)

    inputs = _stack([batch[0] for batch in batches])
    labels = torch.stack([batch[1] for batch in batches])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of operators that vmap runs one after another
        gradients = vmap(grad(find_loss))(_stack(trained), _stack(frozen), inputs, labels)
    for i, own in enumerate(trained):
        for name, parameter in own.items():
            parameter.grad = gradients[name][i].contiguous()
    return None


def _write_one(task: Task, run: Run, batch: Examples) -> None:
    run.optimizer.zero_grad()
    loss = task.loss(run.model(**batch[0]), batch[1])
    if run.penalty is not None:
        loss = loss + run.penalty({n: p for n, p in run.model.named_parameters() if p.requires_grad})
    loss.backward()  # type: ignore[no-untyped-call]


def _stack(tensors: Sequence[dict[str, Tensor]]) -> _Tensors:
    return {name: torch.stack([one[name].detach() for one in tensors]) for name in tensors[0]}
