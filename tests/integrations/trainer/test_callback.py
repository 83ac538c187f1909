"""transformers' Trainer around an adapted model, with a rank budget as a callback."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError, CheckpointError, ConfigError
from tests.integrations.models import Rows, make_adapted, values_of
from tests.integrations.trainer.runs import (
    STEPS,
    TrainerBudget,
    assert_same_values,
    find_budget,
    make_trainer,
    transformers,
)

pytestmark = pytest.mark.filterwarnings("ignore")

BUDGET_FILE = "rank_budget.safetensors"


def test_one_line_trains_and_prunes(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    before = trainer.evaluate()
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before["eval_loss"]
    budget = find_budget(trainer)
    assert (budget.step, budget.live_triplets, budget.schedule.total_steps) == (STEPS, 4, STEPS)
    assert sum(int(p.count_nonzero()) for n, p in trainer.model.adapters.named_parameters() if n.endswith("lam")) == 4
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["adapters/live_triplets"] for entry in logged][-1] == 4
    assert logged[-1]["adapters/rank/first.weight"] == budget.ranks()["first.weight"]
    assert budget.history[-1].loss == pytest.approx(logged[budget.history[-1].step - 2]["loss"])


def test_loggers_get_the_ranks(tmp_path: Path) -> None:
    seen: list[dict[str, float]] = []

    class Logger(transformers.TrainerCallback):  # type: ignore[misc]
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(dict(logs))

    trainer = make_trainer(tmp_path, save_strategy="no")
    callbacks = [Logger(), *[one for one in trainer.callback_handler.callbacks if isinstance(one, TrainerBudget)]]
    trainer = transformers.Trainer(model=trainer.model, args=trainer.args, train_dataset=Rows(), callbacks=callbacks)
    trainer.train()
    assert [entry["adapters/budget"] for entry in seen if "loss" in entry][-1] == 4


@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
@pytest.mark.parametrize("stop", [3, 9], ids=["before the freeze", "after it"])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int, compact: bool, accumulated: int) -> None:
    options: dict[str, Any] = {"gradient_accumulation_steps": accumulated, "lr_scheduler_type": "cosine"}
    whole = make_trainer(tmp_path / "whole", budget={"compact": compact}, **options)
    whole.train()
    resumed = make_trainer(tmp_path / "whole", budget={"compact": compact}, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert_same_values(resumed.model, whole.model)
    expected = values_of(whole.model)
    assert find_budget(whole).step == STEPS
    assert find_budget(resumed).history == find_budget(whole).history
    assert find_budget(resumed).ranks() == find_budget(whole).ranks()
    assert (min(len(v) for n, v in expected.items() if n.endswith("lam")) < 4) == compact


def test_starts_from_data_come_back(tmp_path: Path) -> None:
    runs: list[Any] = []
    for _ in range(2):
        adapted = make_adapted()
        if not runs:
            torch.manual_seed(2)
            batch = {"x": torch.randn(8, 6), "labels": torch.randint(0, 4, (8,))}
            ac.initialize_adapters(adapted, "lora_ga", [batch], lambda model, one: model(**one)["loss"])
        runs.append(make_trainer(tmp_path, adapted))
    if not any("_start" in name for name in values_of(runs[0].model)):
        pytest.fail("the start stores no starting values, so that this shows nothing")
    runs[0].train()
    runs[1].train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert_same_values(runs[1].model, runs[0].model)


@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
def test_the_best_model_keeps_to_the_budget(tmp_path: Path, compact: bool) -> None:
    """With a great learning rate early models are better, but they have more triplets."""
    trainer = make_trainer(
        tmp_path,
        budget={"compact": compact},
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # the worst is the best here, which is an early one
        eval_strategy="steps",
        eval_steps=3,
    )
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert int(best.name.rpartition("-")[2]) > 8
    lam = [p for n, p in trainer.model.adapters.named_parameters() if n.endswith("lam")]
    assert sum(int(p.count_nonzero()) for p in lam) == 4
    assert sum(map(len, lam)) == (4 if compact else 8)


def test_a_checkpoint_without_a_budget_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.train()
    folder = tmp_path / "checkpoint-6"
    (folder / BUDGET_FILE).rename(folder / "elsewhere")
    with pytest.raises(
        CheckpointError, match=r"step 6 is not in .*rank_budget\.safetensors.*TrainerBudget\(checkpoint="
    ):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))
    state = json.loads((folder / "trainer_state.json").read_text())
    state["stateful_callbacks"] = {}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    with pytest.raises(CheckpointError, match="resumed at step 6 from a checkpoint without a budget"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(folder))


def test_the_budget_of_another_run_is_not_taken(tmp_path: Path) -> None:
    for name in ("one", "two"):
        make_trainer(tmp_path / name).train()
    source, target = (tmp_path / name / "checkpoint-6" / BUDGET_FILE for name in ("one", "two"))
    target.write_bytes(source.read_bytes())
    with pytest.raises(CheckpointError, match="is not in"):
        make_trainer(tmp_path / "two").train(resume_from_checkpoint=str(target.parent))


@pytest.mark.parametrize("damage", ["cut", "changed", "of another kind", "pickled"])
def test_a_damaged_budget_is_refused(tmp_path: Path, damage: str) -> None:
    make_trainer(tmp_path).train()
    path = tmp_path / "checkpoint-6" / BUDGET_FILE
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        path.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    elif damage == "of another kind":
        path.write_bytes((path.parent / "adapters.safetensors").read_bytes())
    else:
        torch.save({"budget": {}}, path)
    with pytest.raises(CheckpointError, match=r"rank_budget\.safetensors"):
        make_trainer(tmp_path).train(resume_from_checkpoint=str(path.parent))


def test_other_options_are_refused_by_name(tmp_path: Path) -> None:
    make_trainer(tmp_path).train()
    path = tmp_path / "checkpoint-6"
    with pytest.raises(CheckpointError, match=r"rank_budget\.safetensors.*made with interval=2, this budget has"):
        make_trainer(tmp_path, budget={"interval": 1}).train(resume_from_checkpoint=str(path))


def test_what_cannot_work_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="total_steps=5: expected no number of steps: the training loop says it"):
        TrainerBudget(target_rank=2, total_steps=5)
    trainer = make_trainer(tmp_path, save_strategy="no")
    trainer.model = trainer.model_wrapped = trainer.callback_handler.model = make_adapted().fold()
    with pytest.raises(BudgetError, match="TrainerBudget: 0 adapted models are in the Net"):
        trainer.train()
