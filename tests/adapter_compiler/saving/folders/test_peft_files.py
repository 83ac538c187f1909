"""Folders that peft wrote are read as peft reads them, and peft reads what is written here."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.write_peft import save_peft_adapters


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.down = nn.Linear(10, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(self.up(x).tanh())
        return y


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)
        self.first, self.second = Block(), Block()
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(self.first(self.up(x))))
        return y


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def disturb(module: nn.Module, *names: str) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in names):
                parameter.normal_(0, 0.4)


def from_peft(model: nn.Module, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(model, folder)


CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 3, "lora_alpha": 5},
    "patterns": {"r": 3, "lora_alpha": 5, "rank_pattern": {"first.up": 2}, "alpha_pattern": {"first.up": 7}},
    "rslora": {"r": 3, "lora_alpha": 5, "use_rslora": True},
    "dora": {"r": 3, "lora_alpha": 5, "use_dora": True},
    "head": {"r": 3, "lora_alpha": 5, "modules_to_save": ["head"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_lora_of_peft_merges_as_in_peft(name: str, tmp_path: Path) -> None:
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["up", "down"], **CONFIGS[name]))
    disturb(wrapped, "lora_", "modules_to_save")
    wrapped.save_pretrained(str(tmp_path))
    assert_merges_like(wrapped, before, tmp_path)


def test_adalora_of_peft_merges_as_in_peft(tmp_path: Path) -> None:
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = peft.AdaLoraConfig(
        target_modules=["up", "down"], init_r=4, target_r=2, lora_alpha=6, total_step=10, tinit=1, tfinal=1
    )
    wrapped = peft.get_peft_model(model, config)
    disturb(wrapped, "lora_")
    wrapped.save_pretrained(str(tmp_path))
    assert_merges_like(wrapped, before, tmp_path)


def assert_merges_like(wrapped: Any, before: dict[str, Tensor], folder: Path) -> None:
    merged = wrapped.merge_and_unload().state_dict()
    saved = read_saved_adapters(folder)
    assert len(saved.adapters) == 5
    found = dict(before)
    for site in saved.adapters:
        found[site] = saved.merge(site, before[site])
    for name, key in saved.replacements.items():
        found[name] = saved.tensor(key)
    torch.testing.assert_close(found, dict(merged), rtol=1e-5, atol=1e-6)


def adapt(model: nn.Module, **options: Any) -> ac.AdaptedModel:
    adapted = ac.compile_with_adapters(model, (torch.randn(2, 6),), config=ac.AdapterConfig(rank=4, alpha=6, **options))
    disturb(adapted.adapters, "")
    with torch.no_grad():
        adapted.adapters.get_parameter("first.up.weight.lam")[1:] = 0
        adapted.adapters.get_parameter("second.down.weight.lam").zero_()
    return adapted


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_peft_loads_what_is_written(kind: str, tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(5, 6)
    adapted = adapt(model, exclude=("head",))
    save_peft_adapters(adapted, tmp_path, kind=kind)
    expected = adapted.fold().eval()(x)
    loaded = from_peft(model, tmp_path)
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].peft_type == kind.upper()


@pytest.mark.parametrize("init", [None, "pissa"])
@pytest.mark.parametrize("kind", ["lora", "dora", "dora-svd"])
def test_peft_loads_every_kind(kind: str, init: str | None, tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(5, 6)
    config = ac.AdapterConfig(rank=2, alpha=6, kind=kind, init=init, exclude=("head",))
    adapted = ac.compile_with_adapters(model, (x,), config=config)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    save_peft_adapters(adapted, tmp_path)
    loaded: Any = from_peft(model, tmp_path)
    torch.testing.assert_close(loaded(x), adapted(x), rtol=1e-5, atol=1e-5)
    assert loaded.peft_config["default"].use_dora == ("dora" in kind)
    assert loaded.base_model.model.up.r["default"] == (2 if init is None else 4)


def test_a_mixture_of_dora_and_lora_is_refused(tmp_path: Path) -> None:
    rules = (ac.AdapterRule(name="up.weight", kind="dora"),)
    config = ac.AdapterConfig(rank=2, kind="lora", exclude=("head",), rules=rules)
    adapted = ac.compile_with_adapters(Net(), (torch.randn(2, 6),), config=config)
    with pytest.raises(ConfigError, match=r"has the form 'dora' and site .* 'lora'; PEFT has one use_dora"):
        save_peft_adapters(adapted, tmp_path)


def test_lora_has_exactly_the_pruned_ranks(tmp_path: Path) -> None:
    model = Net().eval()
    save_peft_adapters(adapt(model, exclude=("head",)), tmp_path)
    loaded: Any = from_peft(model, tmp_path).base_model.model
    assert loaded.first.up.r["default"] == 1
    assert loaded.up.r["default"] == 4
    assert isinstance(loaded.second.down, nn.Linear)
    assert not isinstance(loaded.second.down, peft.tuners.lora.LoraLayer)


def test_a_trained_head_goes_along(tmp_path: Path) -> None:
    model, x = Net().eval(), torch.randn(5, 6)
    adapted = adapt(model, trainable=("head.*",))
    disturb(adapted.module, "head")
    save_peft_adapters(adapted, tmp_path)
    torch.testing.assert_close(from_peft(model, tmp_path)(x), adapted.fold().eval()(x), rtol=1e-5, atol=1e-5)


def test_what_peft_cannot_express_is_refused(tmp_path: Path) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.square = nn.Parameter(torch.randn(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.square

    adapted = ac.compile_with_adapters(Bare(), (torch.randn(2, 4),), config=ac.AdapterConfig(rank=2))
    with pytest.raises(ConfigError, match="site square belongs to a Bare"):
        save_peft_adapters(adapted, tmp_path, kind="adalora")
    with pytest.raises(ConfigError, match="expected 'lora' or 'adalora'"):
        save_peft_adapters(adapted, tmp_path, kind="dora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3"),
        ({"use_dora": True}, "lacks its lora_magnitude_vector"),
        ({"bias": "all"}, "bias='all'"),
    ],
)
def test_other_kinds_of_peft_are_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"]))
    wrapped.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        read_saved_adapters(tmp_path)
