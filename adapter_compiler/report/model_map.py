"""A model as a person reads it: its blocks in order, equal ones together, with the weights in each."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from adapter_compiler.model.adapted_model import AdaptedModel
    from passes.planning.site import AdapterSite


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapWeight:
    """One weight; ``rank`` is ``None`` where it carries no adapter."""

    label: str
    role: str
    shape: tuple[int, ...]
    rank: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapBlock:
    """Neighboring blocks with the same weights: ``count`` of them from number ``first`` on, ``None`` outside."""

    name: str
    weights: tuple[MapWeight, ...]
    first: int | None = None
    count: int = 1

    @property
    def title(self) -> str:
        """``encoder.layers.0–11 (12 equal blocks)``."""
        return f"{self.name} ({self.count} equal blocks)" if self.count > 1 else self.name


def map_model(adapted: AdaptedModel) -> tuple[MapBlock, ...]:
    """The blocks of an adapted model in the model's order, with every weight that has or could have an adapter."""
    ranks = {adapter.site.name: adapter.rank for adapter in adapted.plan}
    sites = {site.name: site for site in (*adapted.unadapted_sites, *adapted.sites)}
    ordered = [sites[name] for name, _ in adapted.module.named_parameters() if name in sites]
    depths = _fill_depths([site.depth for site in ordered])
    blocks = []
    for depth, group in groupby(zip(ordered, depths, strict=True), key=lambda pair: pair[1]):
        members = [site for site, _ in group]
        prefix = "" if depth is None else _find_prefix([site.name for site in members])
        weights = tuple(_describe(site, prefix, ranks.get(site.name)) for site in members)
        blocks.append(MapBlock(name=prefix or type(adapted.module).__name__, weights=weights, first=depth))
    return tuple(_join_equal(blocks))


def _fill_depths(depths: Sequence[int | None]) -> list[int | None]:
    """A weight without a number between two of the same block belongs to it."""
    filled = list(depths)
    for place, depth in enumerate(depths):
        before = next((d for d in reversed(depths[:place]) if d is not None), None)
        after = next((d for d in depths[place:] if d is not None), None)
        if depth is None and before == after:
            filled[place] = before
    return filled


def _find_prefix(names: Sequence[str]) -> str:
    """The part of the path that the names share, up to the first number."""
    paths = [name.split(".")[:-1] for name in names]
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    numbered = [place for place, part in enumerate(shared) if part.isdigit()]
    return ".".join(shared[: numbered[0] + 1] if numbered else shared)


def _describe(site: AdapterSite, prefix: str, rank: int | None) -> MapWeight:
    label = site.name.removeprefix(f"{prefix}.").removesuffix(".weight")
    return MapWeight(label=label, role=site.role, shape=site.shape, rank=rank)


def _join_equal(blocks: Iterable[MapBlock]) -> Iterator[MapBlock]:
    for _, group in groupby(blocks, key=lambda block: (block.first is None, block.weights)):
        same = list(group)
        name = same[0].name
        if len(same) > 1:
            name = f"{same[0].name}–{same[-1].name.rpartition('.')[2]}"
        yield dataclasses.replace(same[0], name=name, count=len(same))
