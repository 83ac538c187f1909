"""Train a classifier of images with Lightning, with adapters on its convolutions and a rank budget as a callback.

    python examples/libraries/02_lightning.py

A small convolutional network reads scikit-learn's digits; then all images are rotated, and adapters on every weight,
``sites="auto"``, win most of the accuracy back. The module is an ordinary LightningModule that holds the adapted model.
Needs ``pip install 'adapter-compiler[integrations,demo]'``.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac

STEPS = 150


class Network(nn.Sequential):
    def __init__(self) -> None:
        layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()]
        super().__init__(*layers, nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(512, 10))


def main() -> None:
    import lightning
    from sklearn.datasets import load_digits

    from adapter_compiler.integrations import LightningBudget

    class Module(lightning.LightningModule):
        def __init__(self, model: nn.Module, rate: float) -> None:
            super().__init__()
            self.model, self.rate = model, rate

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=self.rate)

    def fit(model: nn.Module, x: Tensor, rate: float, *callbacks: lightning.Callback) -> None:
        rows = torch.utils.data.TensorDataset(x[:1200], y[:1200])
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
        trainer = lightning.Trainer(
            max_steps=STEPS, accelerator="cpu", logger=False, callbacks=list(callbacks), **quiet
        )
        trainer.fit(Module(model, rate), torch.utils.data.DataLoader(rows, batch_size=64, shuffle=True))

    @torch.no_grad()
    def measure(model: nn.Module, x: Tensor) -> float:
        return float((model.eval()(x[1200:]).argmax(1) == y[1200:]).float().mean())

    torch.manual_seed(0)
    data = load_digits()
    x, y = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16, torch.tensor(data.target)
    rotated, network = x.rot90(1, (2, 3)), Network()
    fit(network, x, 3e-3)
    adapted = ac.compile_with_adapters(network, (x[:2],), config=ac.AdapterConfig(rank=6, alpha=6, sites="auto"))
    before, budget = measure(network, rotated), LightningBudget(target_rank=4)
    fit(adapted, rotated, 1e-2, budget)
    after, folded = measure(adapted, rotated), measure(adapted.fold(), rotated)
    assert budget.budget is not None
    print(f"rotated digits: {before:.1%} before, {after:.1%} adapted, {folded:.1%} folded")
    print(f"ranks: {budget.budget.ranks()}")
    assert after == folded > before + 0.3, "the adapters should win back what the rotation has cost"
    assert budget.budget.live_triplets == 4 * len(adapted.sites), "the budget is met exactly"


if __name__ == "__main__":
    if missing := [name for name in ("lightning", "sklearn") if importlib.util.find_spec(name) is None]:
        print(f"skipped: {missing[0]} is not installed; pip install 'adapter-compiler[integrations,demo]'")
        sys.exit()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    main()
