"""A run of transformers' Trainer that is over in a second."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_compiler as ac
from tests.integrations.models import Rows, make_adapted, values_of

transformers = pytest.importorskip("transformers", reason="the extra 'integrations' is not installed")
pytest.importorskip("accelerate", reason="the extra 'integrations' is not installed")

from adapter_compiler.integrations.trainer import TrainerBudget  # noqa: E402 - after the skip

__all__ = ["STEPS", "TrainerBudget", "assert_same_values", "find_budget", "make_trainer", "transformers"]

STEPS = 12


def make_trainer(
    folder: Path,
    adapted: ac.AdaptedModel | None = None,
    *,
    budget: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer of 12 steps with a budget.

    Args:
        folder: its output.
        adapted: the model; by default the small net.
        budget: further options of the budget.
        trainer: further arguments of the trainer.
        options: of ``TrainingArguments``.
    """
    arguments = transformers.TrainingArguments(
        str(folder),
        **{
            "max_steps": STEPS,
            "per_device_train_batch_size": 4,
            "report_to": [],
            "use_cpu": True,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "disable_tqdm": True,
            "save_strategy": "steps",
            "save_steps": 3,
            **options,
        },
    )
    chosen = {"target_rank": 2, "warmup_steps": 1, "final_steps": 4, "interval": 2, **(budget or {})}
    return transformers.Trainer(
        **{
            "model": make_adapted() if adapted is None else adapted,
            "args": arguments,
            "train_dataset": Rows(),
            "eval_dataset": Rows(8),
            "callbacks": [TrainerBudget(**chosen)],
            **(trainer or {}),
        }
    )


def find_budget(trainer: Any) -> ac.RankBudget:
    """The budget of a trainer's callback."""
    (callback,) = [one for one in trainer.callback_handler.callbacks if isinstance(one, TrainerBudget)]
    assert callback.budget is not None
    return callback.budget


def assert_same_values(found: ac.AdaptedModel, expected: ac.AdaptedModel, *, atol: float = 0.0) -> None:
    """The adapters are the same, by default in every bit."""
    values = values_of(found)
    for name, value in values_of(expected).items():
        torch.testing.assert_close(values[name], value, rtol=atol, atol=atol, msg=name)
