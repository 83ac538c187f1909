"""Options of Trainer that change how it calls, evaluates, saves or compiles the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import adapter_compiler as ac
from tests.integrations.models import Net, Rows, make_adapted
from tests.integrations.trainer.runs import STEPS, assert_same_values, find_budget, make_trainer, transformers

pytestmark = pytest.mark.filterwarnings("ignore")

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


def train(folder: Path, **options: Any) -> Any:
    trainer = make_trainer(folder, **{"save_strategy": "no", **options})
    trainer.train()
    assert (find_budget(trainer).step, find_budget(trainer).live_triplets) == (STEPS, 4)
    return trainer


def test_compiled_it_trains_the_same(tmp_path: Path) -> None:
    plain, compiled = train(tmp_path), train(tmp_path, torch_compile=True, torch_compile_backend="aot_eager")
    assert_same_values(compiled.model, plain.model, atol=1e-4)
    assert find_budget(compiled).history[-1].ranks == find_budget(plain).history[-1].ranks


def test_in_bfloat16_it_trains(tmp_path: Path) -> None:
    trainer = train(tmp_path, bf16=True)
    trained = [p.dtype for p in trainer.model.trainable_parameters()]
    assert trained == [torch.float32] * 6
    assert trainer.evaluate()["eval_loss"] > 0


def test_metrics_and_labels_are_found(tmp_path: Path) -> None:
    def measure(prediction: Any) -> dict[str, float]:
        assert prediction.predictions.shape == (8, 4)
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}

    trainer = train(tmp_path, trainer={"compute_metrics": measure}, label_names=["labels"])
    with torch.no_grad():
        logits = trainer.model(torch.stack([Rows()[i]["x"] for i in range(8)]))["logits"]
    labels = torch.tensor([Rows()[i]["labels"] for i in range(8)])
    assert trainer.evaluate()["eval_accuracy"] == float((logits.argmax(1) == labels).float().mean())
    assert np.array_equal(trainer.predict(Rows(8)).predictions, logits.numpy())
    assert make_trainer(tmp_path, save_strategy="no").label_names == ["labels"]


def test_gradients_are_clipped_and_steps_accumulated(tmp_path: Path) -> None:
    trainer = train(tmp_path, gradient_accumulation_steps=2, max_grad_norm=0.1)
    assert [record.step for record in find_budget(trainer).history][-1] == 8


def test_save_model_writes_all_of_it(tmp_path: Path) -> None:
    trainer = train(tmp_path)
    trainer.save_model(str(tmp_path / "whole"))
    state = load_file(tmp_path / "whole" / "model.safetensors")
    assert state.keys() == trainer.model.state_dict().keys()
    other = make_adapted()
    other.load_state_dict(state)
    torch.testing.assert_close(other(X)["logits"], trainer.model(X)["logits"], rtol=0, atol=0)
    trainer.model.save(tmp_path / "adapters")
    loaded = ac.load(Net(), tmp_path / "adapters")
    torch.testing.assert_close(loaded(X)["logits"], trainer.model(X)["logits"], rtol=0, atol=0)


def test_checkpoints_are_loaded_without_a_trainer(tmp_path: Path) -> None:
    trainer = train(tmp_path, save_strategy="steps", save_steps=STEPS, budget={"compact": True})
    loaded = ac.load(Net(), tmp_path / f"checkpoint-{STEPS}")
    assert loaded.plan == trainer.model.plan
    torch.testing.assert_close(loaded(X)["logits"], trainer.model(X)["logits"], rtol=0, atol=0)


def test_a_limit_of_checkpoints_and_the_latest_one(tmp_path: Path) -> None:
    whole = train(tmp_path, save_strategy="steps", save_steps=4, save_total_limit=1)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == [f"checkpoint-{STEPS}"]
    again = make_trainer(tmp_path, save_steps=4, save_total_limit=1)
    again.train(resume_from_checkpoint=True)
    assert_same_values(again.model, whole.model)


def test_tensorboard_gets_the_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="the extra 'integrations' is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "log"))
    train(tmp_path, report_to=["tensorboard"])
    found = events.EventAccumulator(str(tmp_path / "log"))
    found.Reload()
    tags = found.Tags()["scalars"]
    assert any(tag.endswith("adapters/live_triplets") for tag in tags)


def test_steps_follow_from_epochs(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_strategy="no", max_steps=-1, num_train_epochs=2)
    trainer.train()
    assert find_budget(trainer).schedule.total_steps == find_budget(trainer).step == 16
    assert isinstance(trainer, transformers.Trainer)
