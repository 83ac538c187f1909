"""Observers of a budget, which are called with the record of every masking."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from adapter_compiler.errors import MissingDependencyError
from adapter_compiler.training.budget.masking_record import MaskingRecord


class TensorBoardObserver:
    """Writes budget, live triplets, loss and the rank of each site to TensorBoard.

    ``RankBudget(adapted, optimizer, schedule, observers=[TensorBoardObserver("runs/one")])``
    """

    def __init__(self, target: str | Path | Any, *, prefix: str = "adapters") -> None:
        """Write to a new log in a folder, or to an open ``SummaryWriter``.

        Args:
            target: a folder, or an object with ``add_scalar(tag, value, step)``.
            prefix: the first part of every tag.

        Raises:
            MissingDependencyError: a folder was given and the package tensorboard is not installed.
        """
        if isinstance(target, (str, Path)):
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError as error:
                raise MissingDependencyError(
                    f"TensorBoardObserver({str(target)!r}) needs the package tensorboard, which cannot be imported "
                    f"({error}); pip install tensorboard, or give an open SummaryWriter"
                ) from error
            target = SummaryWriter(str(target))
        self.writer = target
        self.prefix = prefix

    def __call__(self, record: MaskingRecord) -> None:
        """Write one record."""
        values: dict[str, float] = {"budget": record.budget, "live": record.live}
        if record.loss is not None:
            values["loss"] = record.loss
        values.update({f"rank/{site}": rank for site, rank in record.ranks.items()})
        for tag, value in values.items():
            self.writer.add_scalar(f"{self.prefix}/{tag}", value, record.step)
