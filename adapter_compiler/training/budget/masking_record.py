"""What one masking did."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskingRecord:
    """What one masking did.

    Attributes:
        step: when, counted as the schedule counts.
        budget: b(t).
        ranks: live triplets by site.
        live: their sum.
        loss: the last loss given to ``RankBudget.note_loss``.
    """

    step: int
    budget: int
    ranks: dict[str, int]
    live: int
    loss: float | None = None
