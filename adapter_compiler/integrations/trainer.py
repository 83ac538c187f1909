"""A rank budget for transformers' Trainer, and what is built on it: TRL, sentence-transformers, setfit.

In one line: ``Trainer(model=adapted, args=args, train_dataset=data, callbacks=[TrainerBudget(target_rank=4)])``.
"""

from __future__ import annotations

import inspect
import logging
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from adapter_compiler.errors import CheckpointError, MissingDependencyError
from adapter_compiler.integrations.budget_file import read_budget, write_budget
from adapter_compiler.integrations.budgets import BudgetMaker, find_adapted, summarize
from adapter_compiler.training.budget import MaskingRecord, RankBudget

try:
    from transformers.trainer_callback import CallbackHandler, TrainerCallback
except ImportError as error:
    raise MissingDependencyError(
        f"TrainerBudget works with transformers, which cannot be imported ({error}); "
        "pip install adapter-compiler[integrations]"
    ) from error

logger = logging.getLogger(__name__)

#: Name of the file that is written into each checkpoint.
BUDGET_FILE = "rank_budget.safetensors"

#: Where the trainer's state remembers which run a checkpoint belongs to.
_STATE_KEY = "adapter_compiler.TrainerBudget"


class TrainerBudget(TrainerCallback):
    """Prunes to a rank budget while a Trainer trains: options as of ``BudgetSchedule``, without the number of steps.

    The budget is saved with each checkpoint and restored with it. With ``load_best_model_at_end``, only models that
    keep to the budget compete: those from the freeze step on. Budget and ranks are logged with the loss, to whatever
    the trainer reports to.

    Attributes:
        budget: the budget, once training has begun.
    """

    def __init__(
        self,
        *,
        checkpoint: str | Path | None = None,
        observers: Sequence[Callable[[MaskingRecord], None]] = (),
        **options: Any,
    ) -> None:
        """Remember the options until training begins.

        Args:
            checkpoint: where a run is resumed from, if the folder is not ``output_dir/checkpoint-<step>`` any more.
            observers: as of :class:`~adapter_compiler.RankBudget`.
            options: of :class:`~adapter_compiler.BudgetSchedule`.

        Raises:
            ConfigError: ``total_steps`` is given.
        """
        self.budget: RankBudget | None = None
        self._checkpoint = None if checkpoint is None else Path(checkpoint)
        self._maker = BudgetMaker(options, observers)
        self._was_frozen = False
        self._loss: float | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Come before the loggers, so that they get the ranks too."""
        frame = inspect.currentframe()
        handler = None if frame is None or frame.f_back is None else frame.f_back.f_locals.get("self")
        if isinstance(handler, CallbackHandler) and self in handler.callbacks:
            others = [callback for callback in handler.callbacks if callback is not self]
            handler.callbacks = [self, *others]
        else:
            logger.warning("TrainerBudget cannot come before the loggers; ranks are in the trainer's log_history only")

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Make the budget, or restore it with the checkpoint that training goes on from.

        Raises:
            CheckpointError: the run is resumed from a checkpoint without a budget, or its file is not found.
        """
        if self.budget is not None:
            self.budget.detach()
        adapted = find_adapted(kwargs["model"], "TrainerBudget")
        self.budget = self._maker.make(adapted, [kwargs["optimizer"]], state.max_steps)
        if state.global_step:
            path, saved = self._read(args, state)
            try:
                self.budget.load_state_dict(saved["budget"])
            except CheckpointError as error:
                raise CheckpointError(f"{path}: {error}") from error
            self._note_loss(saved["loss"])
        else:
            state.stateful_callbacks[_STATE_KEY] = {"run": uuid.uuid4().hex}
        self._was_frozen = self.budget.is_frozen

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the choice of the best model begin anew when the ranks are final."""
        assert self.budget is not None
        if self.budget.is_frozen and not self._was_frozen:
            self._was_frozen = True
            state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Add the ranks to what is logged with the loss."""
        if self.budget is None or logs is None or "loss" not in logs:
            return
        self._note_loss(float(logs["loss"]))
        values = summarize(self.budget)
        logs.update(values)
        if state.log_history:
            state.log_history[-1].update(values)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the budget and the adapters into the checkpoint that was just written, for a run and for ``load``."""
        assert self.budget is not None
        if not args.should_save:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        find_adapted(kwargs["model"], "TrainerBudget").save(folder)
        write_budget(folder / BUDGET_FILE, self.budget.state_dict(), **self._identify(state), loss=self._loss)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Mask what may have been loaded as the best model."""
        assert self.budget is not None
        if self.budget.is_frozen:
            self.budget.apply_mask()
        self.budget.detach()

    def _note_loss(self, loss: float | None) -> None:
        self._loss = loss
        if loss is not None and self.budget is not None:
            self.budget.note_loss(loss)

    def _read(self, args: Any, state: Any) -> tuple[Path, dict[str, Any]]:
        if _STATE_KEY not in state.stateful_callbacks:
            raise CheckpointError(
                f"the run is resumed at step {state.global_step} from a checkpoint without a budget, expected one that "
                "TrainerBudget wrote; train on from there without it, or start anew"
            )
        for folder in self._candidates(args, state):
            path = folder / BUDGET_FILE
            if path.is_file():
                saved = read_budget(path)
                if {key: saved.get(key) for key in ("run", "step")} == self._identify(state):
                    return path, saved
        looked = ", ".join(str(folder / BUDGET_FILE) for folder in self._candidates(args, state))
        raise CheckpointError(
            f"the budget of the checkpoint at step {state.global_step} is not in {looked}, expected it there; name the "
            "folder: TrainerBudget(checkpoint=...)"
        )

    def _candidates(self, args: Any, state: Any) -> list[Path]:
        given = args.resume_from_checkpoint
        found = [self._checkpoint, Path(given) if isinstance(given, str) else None]
        found.append(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        return [folder for folder in found if folder is not None]

    def _identify(self, state: Any) -> dict[str, Any]:
        return {"run": state.stateful_callbacks[_STATE_KEY]["run"], "step": state.global_step}
