"""The record of one masking."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingRecord:
    """The record of one masking.

    Attributes:
        step: the step number, as the schedule counts.
        budget: b(t), in triplets or parameters.
        ranks: the number of live triplets by site.
        live: the number of live triplets over all sites.
        loss: the last loss given to ``RankBudget.note_loss``, or ``None``.
    """

    step: int
    budget: int
    ranks: dict[str, int]
    live: int
    loss: float | None = None
