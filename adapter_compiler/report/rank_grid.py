"""Ranks and budget as data for a picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankGrid:
    """Ranks by block and weight.

    Attributes:
        blocks: the rows, as in ``blocks.0``.
        weights: the columns, as in ``attention.query``.
        ranks: [blocks, weights]; nan if a block does not have the weight.
        elsewhere: the ranks of weights outside numbered blocks, by name.
    """

    blocks: tuple[str, ...]
    weights: tuple[str, ...]
    ranks: npt.NDArray[np.float64]
    elsewhere: Mapping[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetCurve:
    """The number of live triplets over steps: ``triplets[i]`` from ``steps[i]`` on."""

    steps: tuple[int, ...]
    triplets: tuple[int, ...]
