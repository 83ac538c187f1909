"""A rank budget for Lightning's Trainer.

In one line: ``Trainer(callbacks=[LightningBudget(target_rank=4)])``, to fit a module that holds an adapted model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from adapter_compiler.errors import BudgetError, CheckpointError, MissingDependencyError
from adapter_compiler.integrations.budgets import BudgetMaker, find_adapted, summarize
from adapter_compiler.training.budget import MaskingRecord, RankBudget

try:
    from lightning.pytorch.callbacks import Callback
except ImportError as error:
    raise MissingDependencyError(
        f"LightningBudget works with lightning, which cannot be imported ({error}); "
        "pip install adapter-compiler[integrations]"
    ) from error


class LightningBudget(Callback):  # type: ignore[misc]
    """Prunes to a rank budget while Lightning trains: options as of ``BudgetSchedule``, without the number of steps.

    The budget is in each checkpoint. Budget and ranks are logged at each masking.

    Attributes:
        budget: the budget, once training has begun.
    """

    def __init__(self, *, observers: Sequence[Callable[[MaskingRecord], None]] = (), **options: Any) -> None:
        """Remember the options until training begins.

        Args:
            observers: as of :class:`~adapter_compiler.RankBudget`.
            options: of :class:`~adapter_compiler.BudgetSchedule`.

        Raises:
            ConfigError: ``total_steps`` is given.
        """
        self.budget: RankBudget | None = None
        self._maker = BudgetMaker(options, observers)
        self._saved: dict[str, Any] | None = None
        self._logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the budget, or restore it with the checkpoint that training goes on from.

        Raises:
            BudgetError: the trainer has no end.
            CheckpointError: the run is resumed from a checkpoint without a budget.
        """
        total = trainer.estimated_stepping_batches
        if not math.isfinite(total):
            raise BudgetError(
                f"LightningBudget: the trainer estimates {total} steps, expected a number; give Trainer(max_steps=...) "
                "or max_epochs"
            )
        if self.budget is not None:
            self.budget.detach()
        self.budget = self._maker.make(find_adapted(pl_module, "LightningBudget"), trainer.optimizers, int(total))
        if self._saved is not None:
            self.budget.load_state_dict(self._saved)
        elif trainer.global_step:
            raise CheckpointError(
                f"the run is resumed at step {trainer.global_step} from a checkpoint without a budget, expected one "
                "that was saved with LightningBudget; train on from there without it, or start anew"
            )
        self._saved, self._logged = None, len(self.budget.history)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log budget and ranks after a masking."""
        assert self.budget is not None
        if len(self.budget.history) > self._logged:
            self._logged = len(self.budget.history)
            pl_module.log_dict(summarize(self.budget))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Take the hooks off the optimizers."""
        assert self.budget is not None
        self.budget.detach()

    def state_dict(self) -> dict[str, Any]:
        """The budget's state, for the checkpoint."""
        return {} if self.budget is None else {"budget": self.budget.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the budget's state until the optimizers are there."""
        self._saved = state_dict.get("budget")
