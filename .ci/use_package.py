"""Use the installed package as a user would: import it, compile, train, prune, fold and export a small model.

Run by ``./run package`` from a folder that is not the checkout. Fails if what is imported is not the installed copy,
or if that lacks a file of the checkout.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from pathlib import Path

import torch
from torch import nn

import adapter_compiler as ac
import passes


def find_source_files(root: Path) -> set[str]:
    files = (file for package in ("adapter_compiler", "passes") for file in (root / package).rglob("*"))
    return {str(file.relative_to(root)) for file in files if file.suffix == ".py" or file.name == "py.typed"}


def assert_is_complete(installed_in: Path, checkout: Path) -> None:
    assert ac.__file__ is not None and passes.__file__ is not None
    site = Path(ac.__file__).resolve().parents[1]
    assert site.is_relative_to(installed_in.resolve()), f"imported {site}, expected a folder in {installed_in}"
    assert Path(passes.__file__).resolve().parents[1] == site
    assert importlib.metadata.version("adapter-compiler") == ac.__version__
    odd = find_source_files(site) ^ find_source_files(checkout)
    assert not odd, f"in the wheel or in the checkout only: {sorted(odd)}"
    assert all(getattr(ac, name) is not None for name in ac.__all__)


def adapt_a_model() -> None:
    torch.manual_seed(0)
    model, x, y = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)), torch.randn(64, 8), torch.randn(64, 4)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=4, alpha=4))
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-2)
    budget = ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=20))
    losses = []
    for _ in range(20):
        loss = nn.functional.mse_loss(adapted(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert budget.live_triplets == 2 * len(adapted.sites)
    torch.testing.assert_close(adapted.fold()(x), adapted(x))
    assert ac.export_onnx(adapted, "small.onnx", (x,)).cases


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--installed-in", type=Path, required=True)
    parser.add_argument("--checkout", type=Path, required=True)
    options = parser.parse_args()
    assert_is_complete(options.installed_in, options.checkout)
    adapt_a_model()
