"""Find the smallest adapter that is enough: one wide run, whose adapter is cut to a ladder of sizes.

    1. train a wide adapter;
    2. rank the singular values of its ΔW over all weights (:mod:`adapter_compiler.training.tuning.spectrum`);
    3. keep half of the parts, a quarter, …, train each cut a little more, and evaluate it, until one is not enough;
    4. between the last size that is enough and the first that is not, halve the interval.

Wide first, narrow later: LoRA-Squeeze (arXiv 2602.10993) and PARA (arXiv 2604.27796) find that a cut adapter of a wide
run is better than one that was narrow from the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.calibration.gradients import assert_adapted
from adapter_compiler.training.tuning.size_search import Score, SizePoint, SizeSearch, find_error, read_score
from adapter_compiler.training.tuning.spectrum import Spectrum, add_cut_adapter, count_values, find_spectrum

#: Returns a model with adapters that are wide enough; the random generators are seeded before.
Build = Callable[[], AdaptedModel]
#: Trains the active adapter for a share of the usual number of steps, with an optimizer of its own.
Train = Callable[[AdaptedModel, float], object]
#: Returns a score, larger for a better model, or one for each example.
Evaluate = Callable[[AdaptedModel], Any]


def find_smallest(
    build: Build,
    train: Train,
    evaluate: Evaluate,
    *,
    share_of_full: float | None = None,
    metric: float | None = None,
    full: float | None = None,
    recovery: float = 0.2,
    runs: int = 1,
    refinements: int = 4,
    seed: int = 0,
) -> SizeSearch:
    """Find the smallest adapter that is enough.

    With w sizes on the ladder, the search trains 1 + (w + refinements) · recovery times as long as one wide run.

    Args:
        build: ``build()`` returns the model with a wide adapter, as ``compile_with_adapters`` gives it.
        train: ``train(adapted, share)`` trains the active adapter for this share of its usual steps, 1 for the wide
            run and ``recovery`` after a cut. It makes an optimizer for ``adapted.trainable_parameters()`` each time.
        evaluate: ``evaluate(adapted)`` returns the score, larger for a better model, such as the accuracy or minus the
            loss. It returns a vector to give the score of each example, always the same ones; then one run tells
            how uncertain the differences are. Use examples that nothing was trained on, and the model in eval mode.
        share_of_full: the least share of the full gain that is enough, (score − base) / (full − base); 0.95 unless
            ``metric`` is given.
        metric: the least score that is enough, in place of ``share_of_full``.
        full: the score that counts as the whole gain, such as that of full fine-tuning; by default that of the wide
            adapter.
        recovery: the share of the usual steps that each cut is trained.
        runs: how often to do all this, with other random numbers; sizes are compared by their mean scores.
        refinements: how often to halve the interval in which the smallest size lies.
        seed: the random generator of torch is seeded with ``seed``, ``seed + 1``, … before each run.

    Returns:
        All sizes with their scores and errors, the recommended one, and the model, whose active adapter has that size;
        ``adapted.save`` writes it.

    Raises:
        ConfigError: an option cannot work, the wide adapter is not better than no training or not good enough, or a
            form cannot be cut.
    """
    share = _check_options(share_of_full, metric, recovery, runs, refinements)
    made = [_train_wide(build, train, evaluate, seed + number) for number in range(runs)]
    search = _Search(made=made, train=train, evaluate=evaluate, recovery=recovery, full=full)
    target = search.base + share * (search.full - search.base) if metric is None else metric
    search.assert_enough(target)
    enough = search.descend(target, refinements)
    return search.finish(enough, target)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Run:
    """One wide run."""

    adapted: AdaptedModel
    spectrum: Spectrum
    before: Score
    wide: Score
    name: str


def _train_wide(build: Build, train: Train, evaluate: Evaluate, seed: int) -> _Run:
    torch.manual_seed(seed)
    adapted = build()
    assert_adapted(adapted, "find_smallest: build")
    before = read_score(evaluate(adapted))
    train(adapted, 1.0)
    wide = read_score(evaluate(adapted))
    spectrum = find_spectrum(adapted)
    return _Run(adapted=adapted, spectrum=spectrum, before=before, wide=wide, name=adapted.active_adapter)


class _Search:
    """The sizes that were tried, in all runs."""

    def __init__(
        self, *, made: list[_Run], train: Train, evaluate: Evaluate, recovery: float, full: float | None
    ) -> None:
        self.base = _mean([run.before for run in made])
        self.full = _mean([run.wide for run in made]) if full is None else full
        self._made, self._train, self._evaluate, self._recovery = made, train, evaluate, recovery
        self._is_fixed = full is not None
        self._most = min(len(run.spectrum.order) for run in made)
        self._points: dict[int, SizePoint] = {}
        self._wide = self._describe(
            [count_values(run.adapted.plan) for run in made],
            sum(adapter.rank for adapter in made[0].adapted.plan),
            [run.wide for run in made],
        )

    def assert_enough(self, target: float) -> None:
        if not self.full > self.base:
            raise ConfigError(
                f"find_smallest: the full score is {self.full:.4g} and that before training {self.base:.4g}, expected "
                "a gain, of which a share can be kept; train longer, look at the learning rate, or return a score that "
                "is larger for a better model"
            )
        if self._wide.score < target:
            raise ConfigError(
                f"find_smallest: the wide adapter has a score of {self._wide.score:.4g}, expected at least "
                f"{target:.4g}, which is to be enough; build a wider one, train longer, or ask for less"
            )

    def descend(self, target: float, refinements: int) -> int | None:
        """The smallest number of parts that is enough; ``None`` if no cut is."""
        enough, short = self._most, 0
        while not short and enough > 1:
            enough, short = self._narrow(enough, short, target)
        for _ in range(refinements if short else 0):
            if enough - short > 1:
                enough, short = self._narrow(enough, short, target)
        found = enough if enough in self._points else None
        self._keep_only(found)
        return found

    def _narrow(self, enough: int, short: int, target: float) -> tuple[int, int]:
        """Try the size in the middle; the smallest that is enough and the largest that is not, so far."""
        middle = (enough + short) // 2
        is_enough = self._try(middle, enough).score >= target
        return (middle, short) if is_enough else (enough, middle)

    def finish(self, enough: int | None, target: float) -> SizeSearch:
        first = self._made[0]
        ordered = (*(point for _, point in sorted(self._points.items())), self._wide)
        return SizeSearch(
            points=ordered,
            base=self.base,
            full=self.full,
            target=target,
            recommended=self._wide if enough is None else self._points[enough],
            adapted=first.adapted,
            spectrum=first.spectrum.values,
            runs=len(self._made),
        )

    def _try(self, count: int, enough: int | None) -> SizePoint:
        scores, values = [], []
        for run in self._made:
            self._remove(run, keep=enough)
            values.append(self._cut(run, count))
            self._train(run.adapted, self._recovery)
            scores.append(read_score(self._evaluate(run.adapted)))
        self._points[count] = self._describe(values, count, scores)
        return self._points[count]

    def _cut(self, run: _Run, count: int) -> int:
        """Make the cut adapter of a size the active one; its number of values."""
        run.adapted.use(run.name)  # the tensors of the wide run go along
        add_cut_adapter(run.adapted, _name(count), run.spectrum, run.spectrum.ranks(count))
        run.adapted.use(_name(count))
        return count_values(run.adapted.plan)

    def _remove(self, run: _Run, keep: int | None) -> None:
        """Remove the cut adapters except one."""
        run.adapted.use(run.name)
        for count in self._points:
            if count != keep and _name(count) in run.adapted.adapter_names:
                run.adapted.remove_adapter(_name(count))

    def _keep_only(self, enough: int | None) -> None:
        for run in self._made:
            self._remove(run, keep=enough)
            if enough is not None:
                run.adapted.use(_name(enough))

    def _describe(self, values: list[int], triplets: int, scores: list[Score]) -> SizePoint:
        score, gain = _mean(scores), self.full - self.base
        wide = None if self._is_fixed else [run.wide for run in self._made]
        error = find_error(scores, wide)
        return SizePoint(
            values=sum(values) / len(values),
            triplets=triplets,
            score=score,
            error=find_error(scores),
            share=(score - self.base) / gain if gain else 0.0,
            share_error=None if error is None or not gain else error / abs(gain),
        )


def _name(count: int) -> str:
    return f"cut_to_{count}"


def _mean(scores: list[Score]) -> float:
    return sum(score.mean for score in scores) / len(scores)


def _check_options(share: float | None, metric: float | None, recovery: float, runs: int, refinements: int) -> float:
    if share is not None and metric is not None:
        raise ConfigError(f"find_smallest(share_of_full={share!r}, metric={metric!r}): expected one of them")
    found = 0.95 if share is None else share
    if not 0 < found <= 1:
        raise ConfigError(f"find_smallest(share_of_full={share!r}): expected a number above 0 and at most 1")
    if not 0 < recovery <= 1:
        raise ConfigError(f"find_smallest(recovery={recovery!r}): expected a number above 0 and at most 1")
    for name, value, least in (("runs", runs, 1), ("refinements", refinements, 0)):
        if type(value) is not int or value < least:
            raise ConfigError(f"find_smallest({name}={value!r}): expected an integer of at least {least}")
    return found
