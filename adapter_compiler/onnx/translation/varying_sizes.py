"""Find which dimensions of a call vary together, by running the model at other sizes.

The batch is not always the first dimension: the state of an LSTM has it in the second one, and an attention mask may
have none. So the model is run at other sizes, and what it accepts is counted. Exporters treat sizes of one as fixed,
so they get an example with larger ones where the model accepts those.
"""

from __future__ import annotations

import collections
import functools
import itertools
import logging
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence

import torch

from adapter_compiler.onnx.verification.sizes import Place, find_places, resize, size_of
from passes.capture.calls import ModuleCall

logger = logging.getLogger(__name__)

Group = frozenset[Place]

#: The outputs of a call; raises what the model raises.
Run = Callable[[ModuleCall], Sequence[torch.Tensor]]

#: Runs of the model for one call, and proposals for one dimension.
_MOST_RUNS = 160
_MOST_PROPOSALS = 48
#: Dimensions that are tried in all combinations of this many with another one.
_MOST_COMBINED = 4
#: Dimensions of one number and size that may be refused before the others of the kind are skipped.
_MOST_FAILED = 3


class VaryingSizes:
    """The dimensions of a call that the model accepts other sizes of.

    Args:
        run: runs the model and leaves it as it was.
        call: the example.
    """

    def __init__(self, run: Run, call: ModuleCall) -> None:
        self.call = call
        self._run = run
        self._known: dict[tuple[Group, int], list[torch.Size] | None] = {}

    @functools.cached_property
    def groups(self) -> dict[Group, bool]:
        """Dimensions that vary together, and whether another size of them changes the shape of an output."""
        return self._search([place for place in find_places(self.call) if size_of(self.call, place)])

    @functools.cached_property
    def of_one(self) -> tuple[Group, ...]:
        """The groups of size one that change the shape of an output."""
        found = self._search([place for place in find_places(self.call) if size_of(self.call, place) == 1])
        return tuple(group for group, is_visible in found.items() if is_visible)

    @functools.cached_property
    def batch(self) -> Group:
        """The dimensions of the batch: the group in most tensors, once in each; the first dimensions if none varies."""
        first = frozenset(place for place in find_places(self.call) if place.dimension == 0)
        single = [group for group in self.groups if len({place.tensor for place in group}) == len(group)]
        return max(single, key=lambda group: (self.groups[group], len(group), _count_first(group)), default=first)

    @property
    def has_other_ones(self) -> bool:
        """Whether dimensions other than the batch have size one and can have another."""
        return any(group != self.batch for group in self.of_one)

    def accepts(self, group: Group) -> bool:
        """Whether the model takes two other sizes of these dimensions; one alone may be right by coincidence."""
        return self._shapes(group, 1) is not None and self._shapes(group, 2) is not None

    def is_visible(self, group: Group) -> bool:
        """Whether the model takes another size of these dimensions, and then gives an output of another shape."""
        found = self._shapes(group, 1)
        return found is not None and found != self._shapes(frozenset(), 0)

    def enlarge(self, groups: Sequence[Group]) -> ModuleCall:
        """The call with sizes of one made two, three and so on, one size for each group."""
        sizes = {place: number for number, group in enumerate(groups, 2) for place in group}
        return resize(self.call, {place: size for place, size in sizes.items() if size_of(self.call, place) == 1})

    def _search(self, places: Sequence[Place]) -> dict[Group, bool]:
        """Groups, and whether another size of them changes the shape of an output."""
        found: dict[Group, bool] = {}
        failed: collections.Counter[tuple[int, int]] = collections.Counter()
        for seed in places:
            kind = (seed.dimension, size_of(self.call, seed))
            taken = frozenset[Place]().union(*found)
            if seed in taken or failed[kind] >= _MOST_FAILED:
                continue
            alike = [place for place in places if size_of(self.call, place) == kind[1] and place not in taken]
            group = self._find_group(seed, alike)
            if group is None:
                failed[kind] += 1
            else:
                found[group] = self._shapes(group, 1) != self._shapes(frozenset(), 0)
        return found

    def _find_group(self, seed: Place, alike: Sequence[Place]) -> Group | None:
        """The dimensions that the model accepts other sizes of together with ``seed``, if any."""
        if self._shapes(frozenset(), 0) is None:
            return None
        group = next((group for group in _propose(seed, alike) if self.accepts(group)), None)
        if group is None or size_of(self.call, seed) > 1:
            return group
        # A size of one is broadcast, so others that mean the same are not missed: they are added while outputs agree.
        for place in alike:
            wider = group | {place}
            if place not in group and self.accepts(wider) and self._shapes(wider, 1) == self._shapes(group, 1):
                group = wider
        return group

    def _shapes(self, group: Group, more: int) -> list[torch.Size] | None:
        """The shapes of the outputs with larger sizes of a group; ``None`` where the model refuses them."""
        key = (group, more)
        if key not in self._known:
            self._known[key] = self._measure(group, more) if len(self._known) < _MOST_RUNS else None
        return self._known[key]

    def _measure(self, group: Group, more: int) -> list[torch.Size] | None:
        resized = resize(self.call, {place: size_of(self.call, place) + more for place in group})
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return [tensor.shape for tensor in self._run(resized)]
        except Exception as error:  # the model's own code raises what it likes
            logger.debug("refused with other sizes of %s: %s", sorted(group), error)
            return None


def _count_first(group: Group) -> int:
    return sum(place.dimension == 0 for place in group)


def _propose(seed: Place, alike: Collection[Place]) -> Iterator[Group]:
    """Groups with ``seed`` to try, the likely ones first, from dimensions of the same size."""
    same_number = frozenset(place for place in alike if place.dimension == seed.dimension)
    others = [place for place in alike if place != seed]
    elsewhere = frozenset(place for place in others if place.tensor != seed.tensor)
    small = (
        frozenset({seed, *members})
        for count in range(_MOST_COMBINED)
        for members in itertools.combinations(others, count)
    )
    large = (elsewhere | {seed}, frozenset(alike))
    likely = itertools.islice(small, _MOST_PROPOSALS)
    seen: set[Group] = set()
    for group in itertools.chain([same_number], likely, large):
        if group not in seen:
            seen.add(group)
            yield group
