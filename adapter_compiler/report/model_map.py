"""The structure of a model as data for a picture: its blocks in order, with equal blocks joined, and their weights."""

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
    """One weight.

    Attributes:
        label: its name inside the block.
        role: its role, as in ``attention.query``.
        shape: its shape.
        rank: the rank of its adapter; ``None`` if it has none.
    """

    label: str
    role: str
    shape: tuple[int, ...]
    rank: int | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class MapBlock:
    """A group of consecutive blocks with the same weights.

    Attributes:
        name: the name of the first block, with the number of the last, or the model's class for weights in no block.
        weights: the weights of each block.
        first: the number of the first block; ``None`` for weights in no block.
        count: the number of blocks.
    """

    name: str
    weights: tuple[MapWeight, ...]
    first: int | None = None
    count: int = 1

    @property
    def title(self) -> str:
        """The heading of the block, as in ``encoder.layers.0–11 (12 equal blocks)``."""
        return f"{self.name} ({self.count} equal blocks)" if self.count > 1 else self.name


def map_model(adapted: AdaptedModel) -> tuple[MapBlock, ...]:
    """The blocks of an adapted model in order, with every weight that has or could have an adapter."""
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
    """The block number of each weight; a weight without one between two weights of the same block gets theirs."""
    filled = list(depths)
    for index, depth in enumerate(depths):
        before = next((d for d in reversed(depths[:index]) if d is not None), None)
        after = next((d for d in depths[index:] if d is not None), None)
        if depth is None and before == after:
            filled[index] = before
    return filled


def _find_prefix(names: Sequence[str]) -> str:
    """The path that the names share, up to and including the first number."""
    paths = [name.split(".")[:-1] for name in names]
    shared = [parts[0] for parts in zip(*paths, strict=False) if len(set(parts)) == 1]
    numbered = [index for index, part in enumerate(shared) if part.isdigit()]
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
