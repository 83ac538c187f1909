"""Find weights w_i for a sum Σ w_i ΔW_i of adapters of other tasks from a few examples of a new one (LoraHub).

The weights are searched without gradients by CMA-ES: it needs losses only, so that the examples may be scored in any
way and no memory for a backward pass is needed. The objective is L(w) + l1 Σ |w_i| within −bound ≤ w_i ≤ bound, as in
Huang et al. 2023, LoraHub (https://arxiv.org/abs/2307.13269). Differing from the paper, where the factors are summed,
(Σ w_i B_i)(Σ w_i A_i), the updates are: a sum of factors has products of one adapter's B with another's A.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.errors import ConfigError, MissingDependencyError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import Loss, as_batches
from adapter_compiler.training.random_state import read_random_state, write_random_state
from passes.capture.module_state import restored_state
from passes.planning.json_schema import is_finite

#: The standard deviation of the first draws, as a share of the bound.
_FIRST_SPREAD = 0.3

#: Loss by weights w.
_Measure = Callable[[Sequence[float]], float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Combination:
    """The result of :func:`find_combination`.

    Attributes:
        weights: w_i by adapter.
        loss: the mean loss of the examples with these weights, without the L1 term.
        base_loss: the loss without adapters.
        single_losses: the loss of each adapter alone, by adapter.
        trials: how many sets of weights were tried.
    """

    weights: Mapping[str, float]
    loss: float
    base_loss: float
    single_losses: Mapping[str, float]
    trials: int

    def __str__(self) -> str:
        rows = [f"{name:20} {self.weights[name]:8.3f}  {loss:.4f}" for name, loss in self.single_losses.items()]
        totals = f"combined {self.loss:.4f}, without adapters {self.base_loss:.4f}, {self.trials} trials"
        return "\n".join([f"{'adapter':20}   weight  loss alone", *rows, totals])


def find_combination(
    adapted: AdaptedModel,
    loss: Loss,
    batches: Iterable[Any],
    *,
    name: str,
    adapters: Sequence[str] | None = None,
    rank: int | None = None,
    tensors_from: str | None = None,
    bound: float = 1.5,
    l1: float = 0.05,
    trials: int = 60,
    seed: int = 0,
) -> Combination:
    """Add an inactive adapter Σ w_i ΔW_i whose weights are found on a few examples of a new task.

    No adapter, each one alone and their mean are tried first, so the sum is never worse on the examples than these. The
    model, its modes, gradients and random generators are as before, and the same adapter is active.

    Args:
        adapted: the model with the adapters.
        loss: ``loss(model, batch)`` returns the mean loss of a batch; it is called in eval mode, without gradients.
        batches: the examples.
        name: the name of the sum; activate it with :meth:`AdaptedModel.use`.
        adapters: the names of two or more adapters; by default all that the model has.
        rank: the rank of the sum at each weight; by default the sum is exact.
        tensors_from: the adapter from which the sum takes fully trained parameters and buffers, see
            :meth:`AdaptedModel.combine`.
        bound: the largest |w_i|.
        l1: the factor of Σ |w_i|.
        trials: how many sets of weights are tried, each on all batches.
        seed: of the search.

    Raises:
        ConfigError: a name or value cannot work, an update cannot be added (DoRA), or no loss is finite.
        MissingDependencyError: cma is not installed.
    """
    names = _choose(adapted, adapters, name)
    _assert_options(bound=bound, l1=l1, trials=trials, fewest=len(names) + 3)
    found = as_batches(batches)
    tried: dict[tuple[float, ...], float] = {}

    def measure(point: Sequence[float]) -> float:
        key = tuple(float(weight) for weight in point)
        if key not in tried:
            weights = dict(zip(names, key, strict=True))
            with _combined(adapted, weights, name, rank, tensors_from), restored_state(adapted.module):
                adapted.eval()
                tried[key] = sum(float(loss(adapted, batch)) for batch in found) / len(found)
        return tried[key] + l1 * sum(map(abs, key)) if math.isfinite(tried[key]) else math.inf

    none, *singles = _corners(len(names), bound)
    with _quiet(adapted):
        for weights in (none, *singles, [1 / len(names)] * len(names)):
            measure(weights)
        _search(measure, min(tried, key=measure), bound, trials - len(tried), seed)
    best = min(tried, key=measure)
    if not math.isfinite(tried[best]):
        raise ConfigError(
            f"find_combination: the loss of each of {len(tried)} sets of weights is inf or nan, expected a finite one; "
            "look at the loss of the model without adapters"
        )
    chosen = dict(zip(names, best, strict=True))
    adapted.combine(chosen, name=name, rank=rank, tensors_from=tensors_from)
    alone = {key: tried[tuple(weights)] for key, weights in zip(names, singles, strict=True)}
    return Combination(
        weights=chosen, loss=tried[best], base_loss=tried[tuple(none)], single_losses=alone, trials=len(tried)
    )


def _corners(count: int, bound: float) -> list[list[float]]:
    """All weights zero, and each single one 1 (the bound, if it is smaller)."""
    return [[0.0] * count, *([min(1.0, bound) * (i == k) for i in range(count)] for k in range(count))]


def _search(measure: _Measure, start: Sequence[float], bound: float, trials: int, seed: int) -> None:
    """Try further weights around the best ones so far; the last draws are cut off where trials are used up."""
    cma = _import_cma()
    options = {"bounds": [-bound, bound], "seed": seed + 1, "verbose": -9}  # seed 0 is the clock's
    strategy = cma.CMAEvolutionStrategy(list(start), _FIRST_SPREAD * bound, options)
    while trials > 0:
        drawn = strategy.ask()
        if len(drawn) > trials:
            for weights in drawn[:trials]:
                measure(weights)
            return
        strategy.tell(drawn, [min(measure(weights), 1e30) for weights in drawn])
        trials -= len(drawn)
        if strategy.stop():
            return


def _import_cma() -> Any:
    try:
        import cma
    except ImportError as error:
        raise MissingDependencyError(
            "find_combination searches with cma, which is not installed; pip install 'adapter-compiler[compose]'"
        ) from error
    return cma


@contextlib.contextmanager
def _combined(
    adapted: AdaptedModel, weights: Mapping[str, float], name: str, rank: int | None, tensors_from: str | None
) -> Iterator[None]:
    """A context in which the sum is the active adapter; afterwards it is gone."""
    before = adapted.active_adapter
    adapted.combine(weights, name=name, rank=rank, tensors_from=tensors_from)
    try:
        adapted.use(name)
        yield
    finally:
        adapted.use(before)
        adapted.remove_adapter(name)


@contextlib.contextmanager
def _quiet(adapted: AdaptedModel) -> Iterator[None]:
    """A context without gradients, after which gradients and random generators are as before."""
    _import_cma()
    generators = read_random_state()
    gradients = {parameter: parameter.grad for parameter in adapted.parameters()}
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter, gradient in gradients.items():
            parameter.grad = gradient
        write_random_state(generators)


def _choose(adapted: AdaptedModel, adapters: Sequence[str] | None, name: str) -> list[str]:
    adapted.adapter_set.assert_free(name)
    if isinstance(adapters, str):
        raise ConfigError(f"find_combination(adapters={adapters!r}): expected a list of names, as in ['a', 'b']")
    names = list(adapted.adapter_names if adapters is None else adapters)
    for one in names:
        adapted.adapter_set.assert_known(one)
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(
            f"find_combination(adapters={names!r}): expected two or more different adapters; add them with load_adapter"
        )
    return names


def _assert_options(*, bound: Any, l1: Any, trials: object, fewest: int) -> None:
    if not is_finite(bound) or bound <= 0:
        raise ConfigError(f"find_combination(bound={bound!r}): expected a positive number, such as 1.5")
    if not is_finite(l1) or l1 < 0:
        raise ConfigError(f"find_combination(l1={l1!r}): expected a number of 0 or more, such as 0.05")
    if type(trials) is not int or trials < fewest:
        raise ConfigError(
            f"find_combination(trials={trials!r}): expected an integer of at least {fewest}, which tries no adapter, "
            "each alone, their mean and one more"
        )
