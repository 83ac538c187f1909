"""The intrinsic dimension of a task: how many random directions are enough to learn it.

d90 is the smallest d for which training in a random subspace of d dimensions reaches 90 % of the gain of training all
chosen weights (Li et al. 2018, arXiv 1804.08838; for language models, Aghajanyan et al. 2021, arXiv 2012.13255). It
says how few values a task needs in principle; low-rank adapters, which choose their directions, often need fewer still.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapters.reports import ShownInNotebooks
from adapter_compiler.errors import ConfigError
from adapter_compiler.training.tuning.size_search import Score, find_error, read_score, show_error
from adapter_compiler.training.tuning.subspace import SubspaceModel, frozen
from passes.planning.site import find_matching_glob

#: The first dimension that is tried.
_FIRST = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionPoint:
    """The score of training in a subspace.

    Attributes:
        dimension: d.
        score: the mean score over seeds.
        error: its standard error: over seeds if there are several, else over examples; ``None`` if neither is known.
    """

    dimension: int
    score: float
    error: float | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class IntrinsicDimension(ShownInNotebooks):
    """The result of :func:`~adapter_compiler.measure_intrinsic_dimension`.

    Attributes:
        dimension: the smallest d that was enough.
        short: the largest d below it that was not enough; the true one lies above it.
        points: all dimensions that were tried, in ascending order.
        base: the score before training.
        full: the score of training all chosen weights.
        target: the least score that is enough.
        weights: D, the number of values in the chosen weights.
    """

    dimension: int
    short: int
    points: tuple[DimensionPoint, ...]
    base: float
    full: float
    target: float
    weights: int

    def __str__(self) -> str:
        head = f"intrinsic dimension {self.dimension} (more than {self.short}) of {self.weights:,} values"
        scores = f"before training {self.base:.4g}, full {self.full:.4g}, enough {self.target:.4g}"
        rows = (f"{point.dimension:>10}  {show_error(point.score, point.error)}" for point in self.points)
        return "\n".join([head, scores, *rows])


def measure_intrinsic_dimension(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], Any],
    *,
    weights: Sequence[str] = ("*",),
    share: float = 0.9,
    full: float | None = None,
    most: int | None = None,
    tolerance: float = 1.1,
    seeds: int = 1,
    seed: int = 0,
) -> IntrinsicDimension:
    """Find the smallest dimension of a random subspace in which a task is learned.

    d is doubled until it is enough; then the interval is halved, on a logarithmic scale, until its ends differ by less
    than ``tolerance``. All d share their seeds, so that chance does not decide between neighbors.

    Args:
        model: a plain model; it does not change.
        train: ``train(model)`` trains all parameters that require grad, with an optimizer of its own. It gets a copy of
            the model for the full score, and a model in which only z [d] requires grad for each d. Random numbers are
            seeded before.
        evaluate: ``evaluate(model)`` returns a score, larger for a better model, or one for each example.
        weights: globs over names of parameters; only these train.
        share: the share of the full gain that is enough, 0.9 for d90.
        full: the score of full training, if you know it; else it is measured.
        most: the largest d to try; by default the number of values in the weights.
        tolerance: the largest ratio of the dimension that is found to the one below it, above 1.
        seeds: how many subspaces are tried for each d; their mean score counts.
        seed: the first seed.

    Returns:
        The dimension and all scores. Memory is that of the model, twice for the full score, and O(d).

    Raises:
        ConfigError: an option cannot work, no weight matches, full training gains nothing, or no d is enough.
    """
    names = _find_names(model, weights)
    _check_options(share, tolerance, seeds, most)
    count = sum(model.get_parameter(name).numel() for name in names)
    base = read_score(evaluate(model)).mean
    full = _train_full(model, train, evaluate, names, seed) if full is None else full
    if not full > base:
        raise ConfigError(
            f"measure_intrinsic_dimension: the full score is {full:.4g} and that before training {base:.4g}, expected "
            "a gain; train longer, look at the learning rate, or return a score that is larger for a better model"
        )
    target = base + share * (full - base)
    points: dict[int, DimensionPoint] = {}

    def is_enough(dimension: int) -> bool:
        if dimension not in points:
            scores = [_train_subspace(model, train, evaluate, names, dimension, seed + k) for k in range(seeds)]
            mean = sum(score.mean for score in scores) / seeds
            points[dimension] = DimensionPoint(dimension=dimension, score=mean, error=find_error(scores))
        return points[dimension].score >= target

    short, found = _bisect(is_enough, min(count, most or count), tolerance)
    ordered = tuple(point for _, point in sorted(points.items()))
    if found is None:
        raise ConfigError(
            f"measure_intrinsic_dimension: no dimension up to {short} is enough; the last score is "
            f"{points[short].score:.4g}, expected at least {target:.4g}; raise most, or train longer"
        )
    return IntrinsicDimension(
        dimension=found, short=short, points=ordered, base=base, full=full, target=target, weights=count
    )


def _bisect(is_enough: Callable[[int], bool], most: int, tolerance: float) -> tuple[int, int | None]:
    """The largest dimension that is not enough (0 if 1 is enough), and the smallest that is."""
    short, enough = 0, min(_FIRST, most)
    while not is_enough(enough):
        if enough == most:
            return most, None
        short, enough = enough, min(2 * enough, most)
    while enough - short > 1 and enough > tolerance * short:
        middle = round(math.sqrt(max(1, short) * enough))
        middle = min(max(middle, short + 1), enough - 1)
        short, enough = (short, middle) if is_enough(middle) else (middle, enough)
    return short, enough


def _train_full(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], Any],
    names: Sequence[str],
    seed: int,
) -> float:
    copied = copy.deepcopy(model).requires_grad_(False)
    for name in names:
        copied.get_parameter(name).requires_grad_(True)
    torch.manual_seed(seed)
    train(copied)
    return read_score(evaluate(copied)).mean


def _train_subspace(
    model: nn.Module,
    train: Callable[[nn.Module], object],
    evaluate: Callable[[nn.Module], Any],
    names: Sequence[str],
    dimension: int,
    seed: int,
) -> Score:
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    modes = {module: module.training for module in model.modules()}
    with frozen(model):
        inside = SubspaceModel(model, names, dimension, seed)
        torch.manual_seed(seed)
        try:
            train(inside)
            return read_score(evaluate(inside))
        finally:
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])
            for module, mode in modes.items():
                module.training = mode


def _find_names(model: nn.Module, globs: Sequence[str]) -> list[str]:
    names = [name for name, p in model.named_parameters() if p.is_floating_point() and p.numel()]
    found = [name for name in names if find_matching_glob([name], tuple(globs))]
    if not found:
        raise ConfigError(
            f"measure_intrinsic_dimension(weights={tuple(globs)!r}): no parameter matches, expected globs over names "
            f"such as {', '.join(names[:4])}"
        )
    return found


def _check_options(share: float, tolerance: float, seeds: int, most: int | None) -> None:
    for name, value, is_valid, expected in (
        ("share", share, 0 < share <= 1, "a number above 0 and at most 1"),
        ("tolerance", tolerance, tolerance > 1, "a number above 1"),
        ("seeds", seeds, type(seeds) is int and seeds >= 1, "an integer of at least 1"),
        ("most", most, most is None or (type(most) is int and most >= 1), "an integer of at least 1, or None"),
    ):
        if not is_valid:
            raise ConfigError(f"measure_intrinsic_dimension({name}={value!r}): expected {expected}")
