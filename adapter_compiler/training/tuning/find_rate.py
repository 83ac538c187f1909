"""Find a learning rate by short trial runs, each of which starts from the same state.

A trial of n steps warms up linearly over the first tenth and then decays linearly to zero, as most training does. Rates
are compared by the mean loss of a trial's last quarter, or by the loss on validation batches after it. If the best rate
is the first or the last, further rates are tried on that side.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.adapters.reports import ShownInNotebooks
from adapter_compiler.errors import ConfigError, NonFiniteGradientError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import Loss, as_batches
from adapter_compiler.training.tuning.restored import restored

#: Neighboring rates differ by this factor; a larger one can miss the best by more than methods differ.
STEP = 1.6

#: Further rates on each side, if the best is at the edge.
_MOST_MORE = 10


@dataclasses.dataclass(frozen=True, kw_only=True)
class RateSearch(ShownInNotebooks):
    """The result of :func:`find_rate`.

    Attributes:
        losses: the loss of the trial at each rate, in ascending order of rates; inf for a trial that diverged.
        is_inside: whether the best rate has a worse one on each side; if not, the best one may lie further out.
        steps: the number of optimizer steps of each trial.
    """

    losses: Mapping[float, float]
    is_inside: bool
    steps: int

    @property
    def best(self) -> float:
        """The rate with the smallest loss."""
        return min(self.losses, key=self.losses.__getitem__)

    def __str__(self) -> str:
        rows = [f"{rate:10.3g}  {loss:.4f}{'  best' * (rate == self.best)}" for rate, loss in self.losses.items()]
        note = [] if self.is_inside else ["the best rate is at the edge of the rates that were tried"]
        return "\n".join([f"{'rate':>10}  loss after {self.steps} steps", *rows, *note])


def find_rate(
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: Iterable[Any],
    *,
    rates: Sequence[float] | None = None,
    steps: int | None = None,
    validation: Iterable[Any] = (),
) -> RateSearch:
    """Try learning rates on short runs from the present state, which is put back bit for bit.

    A rate is that of the optimizer's first group; those of the other groups change by the same factor.

    Args:
        adapted: the model, in training mode.
        optimizer: its optimizer, new or in the middle of a run; a :class:`~adapter_compiler.RankBudget` may be on it.
        loss: ``loss(model, batch)`` returns the loss of a batch.
        batches: the batches of a trial; they are repeated if there are fewer than ``steps``.
        rates: the rates to try first; by default five from a quarter of the optimizer's rate to four times that rate,
            a factor of 2 apart, and then those between the neighbors of the best, so that the factor is below 1.6.
        steps: optimizer steps of a trial; by default as many as there are batches. A short trial prefers rates that are
            too high for a long run, so give as many as you can afford.
        validation: batches that are not trained on. With them, rates are compared by the mean loss on these.

    Returns:
        The losses by rate; ``best`` is the rate to use. The optimizer keeps the rates that it had.

    Raises:
        ConfigError: a value cannot work, or every trial diverged.
    """
    found, held_out = as_batches(batches), list(validation)
    steps = len(found) if steps is None else steps
    first = _choose_rates(optimizer, rates, steps)
    losses: dict[float, float] = {}
    with restored(adapted, optimizer) as put_back:

        def try_rate(rate: float) -> None:
            if rate not in losses:
                put_back()
                losses[rate] = _run(adapted, optimizer, loss, found, rate, steps, held_out)

        for rate in first:
            try_rate(rate)
        _widen(losses, try_rate)
        if rates is None:
            for rate in _find_between(losses):
                try_rate(rate)
    if not any(map(math.isfinite, losses.values())):
        raise ConfigError(
            f"find_rate: the loss of every trial became inf or nan, at rates from {min(losses):g} to {max(losses):g}, "
            "expected a finite one; look at the loss of the first batch, or give lower rates=(...)"
        )
    ordered = dict(sorted(losses.items()))
    best = min(ordered, key=ordered.__getitem__)
    return RateSearch(losses=ordered, is_inside=min(ordered) < best < max(ordered), steps=steps)


def _choose_rates(optimizer: torch.optim.Optimizer, rates: Sequence[float] | None, steps: object) -> list[float]:
    if type(steps) is not int or steps < 4:
        raise ConfigError(
            f"find_rate(steps={steps!r}): expected an integer of at least 4; repeat batches or give steps"
        )
    base = float(optimizer.param_groups[0]["lr"])
    if base <= 0:
        raise ConfigError(
            f"find_rate: the optimizer's first group has lr={base:g}, expected more than 0, by which the rates of all "
            "groups are scaled; make the optimizer with a positive rate"
        )
    if rates is None:
        return [base * 2.0**power for power in range(-2, 3)]
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ConfigError(f"find_rate(rates={rates!r}): expected positive numbers, such as (1e-3, 1.6e-3, 2.5e-3)")
    return [float(rate) for rate in rates]


def _widen(losses: dict[float, float], try_rate: Any) -> None:
    """Try further rates beyond the best one until there is a worse one on each side."""
    for _ in range(_MOST_MORE):
        ordered = sorted(losses)
        best = min(losses, key=losses.__getitem__)
        if best == ordered[0] or not math.isfinite(losses[best]):
            try_rate(ordered[0] / STEP)
        elif best == ordered[-1]:
            try_rate(ordered[-1] * STEP)
        else:
            return


def _find_between(losses: Mapping[float, float]) -> list[float]:
    """The geometric means of the best rate and its neighbors."""
    ordered = sorted(losses)
    at = ordered.index(min(losses, key=losses.__getitem__))
    return [math.sqrt(ordered[at] * ordered[i]) for i in (at - 1, at + 1) if 0 <= i < len(ordered)]


def _run(
    adapted: AdaptedModel,
    optimizer: torch.optim.Optimizer,
    loss: Loss,
    batches: Sequence[Any],
    rate: float,
    steps: int,
    held_out: Sequence[Any],
) -> float:
    """The loss of one trial; inf if it diverges."""
    base = [float(group["lr"]) for group in optimizer.param_groups]
    seen = []
    for step in range(steps):
        for group, own in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = own * rate / base[0] * _schedule(step, steps)
        optimizer.zero_grad()
        value = loss(adapted, batches[step % len(batches)])
        seen.append(float(value.detach()))
        if not math.isfinite(seen[-1]):
            return math.inf
        value.backward()
        try:
            optimizer.step()
        except NonFiniteGradientError:
            return math.inf
    last = seen[-max(1, steps // 4) :]
    found = _evaluate(adapted, loss, held_out) if held_out else sum(last) / len(last)
    return found if math.isfinite(found) else math.inf


def _schedule(step: int, steps: int) -> float:
    """The share of the peak rate: a linear warm-up over a tenth of the steps, then a linear decay to zero."""
    warmup = max(1, steps // 10)
    return (step + 1) / warmup if step < warmup else (steps - step) / (steps - warmup + 1)


@torch.no_grad()
def _evaluate(adapted: AdaptedModel, loss: Loss, batches: Sequence[Any]) -> float:
    """The mean loss in eval mode; the state that is put back next includes the training modes."""
    adapted.eval()
    return sum(float(loss(adapted, batch)) for batch in batches) / len(batches)
