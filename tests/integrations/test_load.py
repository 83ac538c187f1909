"""A folder of adapters says all that is needed to load it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.adapters.compact import compact_adapters
from adapter_compiler.errors import CheckpointError
from tests.integrations.models import Net, draw_values, make_adapted

X = torch.randn(5, 6, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("kind", ["svd", "lora", "dora-svd"])
def test_nothing_has_to_be_remembered(kind: str, tmp_path: Path) -> None:
    adapted = make_adapted(3, kind=kind, alpha=5.0, gamma=0.2, trainable="second.bias", sites="*.weight", fused=False)
    draw_values(adapted)
    with torch.no_grad():
        adapted.module.get_parameter("second.bias").add_(1)
    adapted.save(tmp_path)
    loaded = ac.load(Net(), tmp_path)
    torch.testing.assert_close(loaded(X)["logits"], adapted(X)["logits"], rtol=0, atol=0)
    assert loaded.plan == adapted.plan
    assert (loaded.options.gamma, loaded.options.alpha, loaded.options.fused) == (0.2, 5.0, False)
    assert [p.shape for p in loaded.trainable_parameters()] == [p.shape for p in adapted.trainable_parameters()]
    torch.testing.assert_close(loaded.fold()(X)["logits"], adapted.fold()(X)["logits"], rtol=0, atol=0)


def test_smaller_ranks_and_starts_are_in_it(tmp_path: Path) -> None:
    adapted = make_adapted()
    batch = {"x": torch.randn(8, 6), "labels": torch.randint(0, 4, (8,))}
    ac.initialize_adapters(adapted, "lora_ga", [batch], lambda model, one: model(**one)["loss"])
    draw_values(adapted)
    compact_adapters(adapted, {"first.weight": torch.tensor([1, 2]), "second.weight": torch.tensor([0])})
    adapted.save(tmp_path)
    loaded = ac.load(Net(), tmp_path)
    assert loaded.plan == adapted.plan
    torch.testing.assert_close(loaded(X)["logits"], adapted(X)["logits"], rtol=0, atol=0)


def test_folders_of_peft_are_loaded(tmp_path: Path) -> None:
    adapted = make_adapted()
    draw_values(adapted)
    adapted.save_pretrained(tmp_path)
    loaded = ac.load(Net(), tmp_path)
    assert {adapter.form.name for adapter in loaded.plan} == {"lora"}
    torch.testing.assert_close(loaded(X)["logits"], adapted(X)["logits"])


def test_another_model_is_refused(tmp_path: Path) -> None:
    make_adapted().save(tmp_path)
    with pytest.raises(CheckpointError, match=r"adapters\.safetensors: .*first\.weight.*belongs to another model"):
        ac.load(nn.Sequential(nn.Linear(6, 16)), tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        ac.load(Net(), tmp_path / "nowhere")
