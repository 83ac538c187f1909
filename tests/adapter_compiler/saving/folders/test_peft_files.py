"""Folders that peft wrote are read as peft reads them, and peft reads what is written here."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.write_peft import save_peft_adapters
from adapter_compiler.saving.folding.fold_files import fold_files


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


def test_pruned_adalora_of_peft_merges_as_in_peft(tmp_path: Path) -> None:
    """peft keeps the scale of the first rank, whatever ranks are left: three sites, of which one has nothing left."""
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = peft.AdaLoraConfig(
        target_modules=["first.up", "first.down", "second.up"], init_r=4, target_r=1, lora_alpha=6, total_step=10,
        tinit=1, tfinal=2, deltaT=1,
    )  # fmt: skip
    wrapped: Any = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:  # the sites differ in what their triplets are worth
                parameter.normal_(0, 1 if "first.up" in name else 0.5 if "first.down" in name else 1e-4)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], 0.01)
    for step in range(10):
        wrapped(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        wrapped.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    with warnings.catch_warnings():  # of the site with no triplet
        warnings.simplefilter("ignore")
        wrapped.save_pretrained(str(tmp_path))
    ranks = {name: sum(kept) for name, kept in wrapped.peft_config["default"].rank_pattern.items()}
    assert sum(ranks.values()) == 3
    assert ranks["second.up.lora_E"] == 0
    assert_merges_like(from_peft(restore(before), tmp_path), before, tmp_path, sites=3)


def restore(state: dict[str, Tensor]) -> Net:
    net = Net()
    net.load_state_dict(state)
    return net


def assert_merges_like(wrapped: Any, before: dict[str, Tensor], folder: Path, sites: int = 5) -> None:
    merged = wrapped.merge_and_unload().state_dict()
    saved = read_saved_adapters(folder)
    assert len(saved.adapters) == sites
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
    with pytest.raises(ConfigError, match=r"site square is a weight of the kind 'parameter'; PEFT's AdaLoRA takes"):
        save_peft_adapters(adapted, tmp_path, kind="adalora")
    with pytest.raises(ConfigError, match="expected 'lora' or 'adalora'"):
        save_peft_adapters(adapted, tmp_path, kind="dora")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("other", "tensor other: neither modules_to_save nor bias nor any other field explains it"),
        ("up.weight", "tensor up.weight: neither modules_to_save nor bias nor any other field explains it"),
        ("up.lora_B.bias", r"adapter_config.json has lora_bias=False"),
        ("up.lora_magnitude_vector", "has lora_magnitude_vector, expected the parts A, B"),
        ("up.lora_E", "has lora_E, expected the parts A, B"),
        ("up.lora_diag", "up.lora_diag: it is a part of a kind of adapter that is no ΔW"),
        ("up.lora_A.default.weight", "it is a part of a kind of adapter that is no ΔW"),
        ("up.token_adapter.trainable_tokens_delta", "adapter_config.json has trainable_token_indices=None"),
        ("up.base_layer.bias", "neither bias nor an adapted embedding explains it"),
        ("head.base_layer.weight", "neither bias nor an adapted embedding explains it"),
        ("up.inner.base_layer.more.lora_A.weight", "a module of a kind that is unknown here"),
        ("x.base_layer.out_proj.lora_A.weight", "module x lacks its lora_B"),
    ],
)
def test_a_tensor_that_no_field_explains_is_named(name: str, message: str, tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"], exclude_modules=["first.up"]))
    wrapped.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), f"base_model.model.{name}": torch.zeros(6, 3)}, path)
    with pytest.raises(CheckpointError, match=message):
        read_saved_adapters(tmp_path)


def test_a_tensor_that_the_base_lacks_is_named(tmp_path: Path) -> None:
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first.up"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({**load_file(path), "base_model.model.odd.weight": torch.zeros(6, 3)}, path)
    save_file(Net().state_dict(), tmp_path / "base.safetensors")
    with pytest.raises(
        CheckpointError, match=r"holds a tensor odd\.weight, which neither its configuration explains nor"
    ):
        fold_files(tmp_path / "base.safetensors", tmp_path, tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


def test_integers_are_no_adapters(tmp_path: Path) -> None:
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["first.up"])).save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(torch.int8) for name, tensor in load_file(path).items()}, path)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight: it is I8, expected floating-point numbers"):
        read_saved_adapters(tmp_path)


def test_a_pickle_is_not_read(tmp_path: Path) -> None:
    wrapped = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"]))
    wrapped.save_pretrained(str(tmp_path), safe_serialization=False)
    with pytest.raises(CheckpointError, match=r"holds adapter_model\.bin, a pickle, .* load it with PEFT and call"):
        read_saved_adapters(tmp_path)


def test_load_adapters_names_the_function_for_folders_of_peft(tmp_path: Path) -> None:
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=["up"])).save_pretrained(str(tmp_path))
    adapted = adapt(Net(), exclude=("head",))
    with pytest.raises(CheckpointError, match=r"holds adapters of PEFT, .* adapted\.load_adapter\(name, folder\)"):
        ac.load_adapters(adapted, tmp_path)
