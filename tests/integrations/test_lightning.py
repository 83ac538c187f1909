"""Lightning around an adapted model, with a rank budget as a callback."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError, CheckpointError
from tests.integrations.models import Rows, make_adapted, values_of

lightning = pytest.importorskip("lightning", reason="the extra 'integrations' is not installed")

from adapter_compiler.integrations.lightning import LightningBudget  # noqa: E402 - after the skip

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.adapted = make_adapted()

    def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
        loss: torch.Tensor = self.adapted(batch["x"], labels=batch["labels"])["loss"]
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.adapted.trainable_parameters(), lr=1e-2)


def fit(
    folder: Path, *, compact: bool = False, checkpoint: Path | None = None, batches: int = 1, **options: Any
) -> tuple[Any, Any]:
    budget = LightningBudget(target_rank=2, warmup_steps=1, final_steps=4, interval=2, compact=compact)
    keep = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    arguments = {"max_steps": 12, "logger": False, "accelerator": "cpu", "callbacks": [budget, keep], **options}
    trainer = lightning.Trainer(enable_progress_bar=False, enable_model_summary=False, **arguments)
    module = Module()
    loader = torch.utils.data.DataLoader(Rows(4 * batches), batch_size=4)  # Lightning begins an epoch anew
    trainer.fit(module, loader, ckpt_path=None if checkpoint is None else str(checkpoint))
    return module.adapted, budget


@pytest.mark.parametrize("compact", [False, True], ids=["masked", "compact"])
@pytest.mark.parametrize("stop", [3, 9], ids=["before the freeze", "after it"])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path, stop: int, compact: bool) -> None:
    whole, expected = fit(tmp_path, compact=compact)
    assert expected.budget.live_triplets == 4
    resumed, found = fit(tmp_path / "again", compact=compact, checkpoint=tmp_path / f"step={stop}.ckpt")
    for name, value in values_of(whole).items():
        torch.testing.assert_close(values_of(resumed)[name], value, rtol=0, atol=0, msg=name)
    assert found.budget.history == expected.budget.history
    assert (sum(adapter.rank for adapter in whole.plan) == 4) == compact


@pytest.mark.parametrize("options", [{"accumulate_grad_batches": 2}, {"precision": "bf16-mixed"}], ids=str)
def test_it_resumes_with_the_options_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    whole, expected = fit(tmp_path, batches=2, **options)
    assert (expected.budget.step, expected.budget.live_triplets) == (12, 4)
    again, found = fit(tmp_path / "again", batches=2, checkpoint=tmp_path / "step=6.ckpt", **options)
    for name, value in values_of(whole).items():
        torch.testing.assert_close(values_of(again)[name], value, rtol=0, atol=0, msg=name)
    assert found.budget.history == expected.budget.history


def test_ranks_are_logged(tmp_path: Path) -> None:
    logger = lightning.pytorch.loggers.CSVLogger(tmp_path)
    _, callback = fit(tmp_path, logger=logger, log_every_n_steps=1)
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "adapters/live_triplets" in text
    assert "adapters/rank/first.weight" in text
    assert callback.budget.history


def test_a_checkpoint_without_a_budget_is_refused(tmp_path: Path) -> None:
    fit(tmp_path)
    path = tmp_path / "step=3.ckpt"
    checkpoint = torch.load(path, weights_only=False)
    checkpoint["callbacks"] = {k: v for k, v in checkpoint["callbacks"].items() if "LightningBudget" not in k}
    torch.save(checkpoint, path)
    with pytest.raises(CheckpointError, match="resumed at step 3 from a checkpoint without a budget"):
        fit(tmp_path / "again", checkpoint=path)


def test_a_run_without_an_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="the trainer estimates inf steps, expected a number"):
        fit(tmp_path, max_steps=-1, max_epochs=-1)


def test_two_optimizers_are_one_step(tmp_path: Path) -> None:
    class Manual(Module):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            named = dict(self.adapted.adapters.named_parameters())
            lam = [p for name, p in named.items() if name.endswith("lam")]
            others = [p for name, p in named.items() if not name.endswith("lam")]
            return [torch.optim.AdamW(lam, lr=1e-2), torch.optim.SGD(others, lr=1e-2)]

        def training_step(self, batch: dict[str, Any], index: int) -> torch.Tensor:
            loss = super().training_step(batch, index)
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()
            return loss

    module = Manual()
    module.train()
    trainer = lightning.Trainer(max_steps=20, logger=False, enable_progress_bar=False, enable_checkpointing=False)
    budgets: list[ac.RankBudget] = []

    class Watch(lightning.pytorch.callbacks.Callback):  # type: ignore[misc, name-defined]
        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            schedule = ac.BudgetSchedule(target_rank=2, total_steps=10)
            budgets.append(ac.RankBudget(module.adapted, pl_module.optimizers(), schedule))

    trainer.callbacks.append(Watch())
    trainer.fit(module, torch.utils.data.DataLoader(Rows(40), batch_size=4))
    assert budgets[0].step == 10
    assert budgets[0].live_triplets == 4
