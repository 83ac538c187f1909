"""What is written for each kind of layer gives the same numbers in peft, or is refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.write_peft import convert_to_peft, save_peft_adapters

LAYERS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Linear(8, 6), torch.randn(3, 8)),
    "Conv1D": lambda: (Conv1D(6, 8), torch.randn(3, 8)),
    "square Conv1D": lambda: (Conv1D(8, 8), torch.randn(3, 8)),
    "embedding": lambda: (nn.Embedding(9, 6), torch.randint(0, 9, (5,))),
    "square embedding": lambda: (nn.Embedding(6, 6), torch.randint(0, 6, (5,))),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 6)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2), torch.randn(2, 4, 6, 6)),
    "conv3d": lambda: (nn.Conv3d(4, 6, 2), torch.randn(2, 4, 3, 3, 3)),
}

TAKEN = {
    "lora": set(LAYERS),
    "dora": {name for name in LAYERS if "embedding" not in name},
    "adalora": {"linear", "Conv1D", "square Conv1D", "conv2d"},
}


class Net(nn.Module):
    """Some layers, and a linear layer and a head that are always there."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(layers)
        self.mix = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        outputs = [part(x) for part, x in zip(self.parts, inputs[1:], strict=True)]
        return [self.head(self.mix(inputs[0])), *outputs]


def make(*names: str) -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    parts, inputs = zip(*(LAYERS[name]() for name in names), strict=True) if names else ((), ())
    return Net(*parts).eval(), [torch.randn(2, 5), *inputs]


def adapt(net: nn.Module, inputs: Any, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(**{"rank": 3, "alpha": 5, "sites": ("*",), "exclude": ("head.*",), **options})
    adapted = ac.compile_with_adapters(net, (inputs,), config=config)
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return adapted


def load(net: nn.Module, folder: Path) -> Any:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        loaded = peft.PeftModel.from_pretrained(net, folder).eval()
    assert not [one for one in found if "missing" in str(one.message) or "Unexpected keyword" in str(one.message)]
    return loaded


def assert_loads_alike(folder: Path, adapted: ac.AdaptedModel, *names: str) -> None:
    net, inputs = make(*names)
    expected = adapted(inputs)
    loaded = load(net, folder)
    torch.testing.assert_close(loaded(inputs), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TAKEN)
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer(name: str, kind: str, tmp_path: Path) -> None:
    adapted = adapt(*make(name), kind="dora" if kind == "dora" else "svd")
    write = "adalora" if kind == "adalora" else "lora"
    if name not in TAKEN[kind]:
        with pytest.raises(
            ConfigError, match=r"site parts\.0\.weight is .*(PEFT's DoRA has one for each|AdaLoRA takes)"
        ):
            save_peft_adapters(adapted, tmp_path, kind=write)
        assert not list(tmp_path.iterdir())
        return
    save_peft_adapters(adapted, tmp_path, kind=write)
    assert_loads_alike(tmp_path, adapted, name)


def test_all_layers_together(tmp_path: Path) -> None:
    adapted = adapt(*make(*LAYERS))
    save_peft_adapters(adapted, tmp_path)
    assert_loads_alike(tmp_path, adapted, *LAYERS)


@pytest.mark.parametrize("start", ["native", "peft"])
def test_converted_folders(start: str, tmp_path: Path) -> None:
    """The files say what kind of module each weight belongs to, so that no model is needed."""
    adapted = adapt(*make(*LAYERS))
    if start == "native":
        adapted.save(tmp_path / "first")
    else:
        save_peft_adapters(adapted, tmp_path / "first")
    convert_adapters(tmp_path / "first", tmp_path / "second", to="peft-lora")
    assert_loads_alike(tmp_path / "second", adapted, *LAYERS)
    convert_adapters(tmp_path / "second", tmp_path / "third", to="native")
    convert_adapters(tmp_path / "third", tmp_path / "fourth", to="peft-lora")
    assert_loads_alike(tmp_path / "fourth", adapted, *LAYERS)
    again = ac.compile_with_adapters(make(*LAYERS)[0], (make(*LAYERS)[1],), config=adapted.options)
    again.load_adapter("again", tmp_path / "fourth")
    again.use("again")
    torch.testing.assert_close(again(make(*LAYERS)[1]), adapted(make(*LAYERS)[1]), rtol=1e-5, atol=1e-5)


def test_a_file_without_kinds_of_modules_is_not_converted_to_peft(tmp_path: Path) -> None:
    adapted = adapt(*make("linear"))
    adapted.save(tmp_path / "first")
    saved = read_saved_adapters(tmp_path / "first")
    assert {one.layer for one in saved.adapters.values()} == {"linear"}
    unknown = {name: dataclasses.replace(one, layer="") for name, one in saved.adapters.items()}
    with pytest.raises(ConfigError, match=r"does not say what kind of module mix\.weight belongs to"):
        convert_to_peft(dataclasses.replace(saved, adapters=unknown), tmp_path / "second")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.mlp(x + self.attention(x, x, x, need_weights=False)[0])
        return y


def test_in_proj_of_an_attention_is_written_and_out_proj_is_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Attention().eval(), torch.randn(2, 5, 8)
    adapted = adapt(model, x, exclude=("*out_proj*",))
    save_peft_adapters(adapted, tmp_path / "in_proj")
    loaded, expected = load(model, tmp_path / "in_proj"), adapted(x).detach()
    torch.testing.assert_close(loaded(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.merge_and_unload()(x), expected, rtol=1e-5, atol=1e-5)
    torch.manual_seed(0)
    adapted = adapt(Attention().eval(), x, exclude=())
    with pytest.raises(ConfigError, match=r"attention\.out_proj\.weight is a weight of an nn\.MultiheadAttention"):
        save_peft_adapters(adapted, tmp_path / "out_proj")
    assert not (tmp_path / "out_proj").exists()
    adapted.save(tmp_path / "native")
    with pytest.raises(ConfigError, match=r"attention\.out_proj\.weight is a weight of an nn\.MultiheadAttention"):
        convert_adapters(tmp_path / "native", tmp_path / "peft", to="peft-lora")


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        (nn.Conv2d(4, 6, 3, groups=2), "Conv2d with 2 groups"),
        (nn.Conv2d(4, 6, 3, dilation=2), r"Conv2d with dilation \(2, 2\)"),
        (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), "Conv2d with padding_mode 'circular'"),
        (nn.ConvTranspose2d(4, 6, 3), "ConvTranspose2d"),
    ],
    ids=str,
)
def test_convolutions_that_peft_computes_in_another_way_are_refused(
    layer: nn.Module, kind: str, tmp_path: Path
) -> None:
    adapted = adapt(Net(layer).eval(), [torch.randn(2, 5), torch.randn(2, 4, 6, 6)])
    if "parts.0.weight" not in adapted.plan.by_weight:
        pytest.skip("no adapter for this layer")
    with pytest.raises(ConfigError, match=f"site parts.0.weight is a weight of the kind [\"']{kind}"):
        save_peft_adapters(adapted, tmp_path)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).tanh())
        return y


def test_a_tied_weight_is_refused(tmp_path: Path) -> None:
    adapted = adapt(Tied(), torch.randn(2, 4), exclude=())
    with pytest.raises(ConfigError, match=r"site first\.weight is also second\.weight: .* compile with untie="):
        save_peft_adapters(adapted, tmp_path)


@pytest.mark.parametrize("kind", ["lora", "adalora"])
def test_trained_biases_of_adapted_layers_go_along(kind: str, tmp_path: Path) -> None:
    adapted = adapt(*make(), trainable=("mix.bias", "head.*"))
    save_peft_adapters(adapted, tmp_path, kind=kind)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["bias"] == "lora_only"
    assert_loads_alike(tmp_path, adapted)
    saved = read_saved_adapters(tmp_path)
    assert saved.replacements.keys() == {"mix.bias", "head.weight", "head.bias"}
    convert_adapters(tmp_path, tmp_path / "again", to="peft-lora")
    assert_loads_alike(tmp_path / "again", adapted)


class Heads(nn.Module):
    """peft saves all modules whose names end with that of a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head, self.other_head = nn.Linear(5, 4), nn.Linear(4, 3), nn.Linear(4, 3)
        self.deep = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(x)
        y: Tensor = self.deep(self.head(h) + self.other_head(h)) * self.scale
        return y


def test_modules_of_similar_names_are_saved_as_peft_loads_them(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = Heads().eval(), torch.randn(4, 5)
    adapted = adapt(model, x, sites=("mix.weight",), exclude=(), trainable=("head.*", "deep.0.weight", "deep.1.*"))
    save_peft_adapters(adapted, tmp_path)
    torch.testing.assert_close(load(model, tmp_path)(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_what_was_trained_but_has_no_place_is_refused(tmp_path: Path) -> None:
    model, x = Heads().eval(), torch.randn(4, 5)
    adapted = adapt(model, x, sites=("mix.weight",), exclude=(), trainable=("scale",))
    with pytest.raises(ConfigError, match="scale is a parameter of the model itself and was trained fully"):
        save_peft_adapters(adapted, tmp_path)
    adapted = adapt(model, x, sites=("mix.weight", "other_head.weight"), exclude=(), trainable=("head.*",))
    with pytest.raises(ConfigError, match="module other_head has parameters that were trained fully and other_head"):
        save_peft_adapters(adapted, tmp_path)


class Tokens(nn.Module):
    """A parameter, a list of parameters and a buffer, none of which is called weight or bias."""

    def __init__(self) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 5))
        self.more = nn.ParameterList([nn.Parameter(torch.ones(5)) for _ in range(2)])
        self.register_buffer("shift", torch.ones(5))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.cls_token.expand(len(x), -1, -1), x * self.more[0] + self.more[1] + self.shift], dim=1)


class WithTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.mix = Tokens(), nn.Linear(5, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.mix(self.tokens(x))
        y: Tensor = self.attention(h, h, h, need_weights=False)[0]
        return y


def adapt_tokens(*trainable: str) -> tuple[nn.Module, Tensor, ac.AdaptedModel]:
    torch.manual_seed(0)
    model, x = WithTokens().eval(), torch.randn(2, 3, 5)
    return copy.deepcopy(model), x, adapt(model, x, sites=("mix.weight",), exclude=(), trainable=trainable)


@pytest.mark.parametrize("to", ["peft-lora", "peft-adalora", "lora"])
def test_trained_parameters_of_any_name_go_along(to: str, tmp_path: Path) -> None:
    base, x, adapted = adapt_tokens("tokens.*", "attention.*", "mix.bias")
    adapted.module.get_buffer("tokens.shift").add_(1)
    adapted.save(tmp_path / "native")
    folders = [convert_adapters(tmp_path / "native", tmp_path / "first", to=to)]
    convert_adapters(tmp_path / "first", tmp_path / "back", to="native")
    folders.append(convert_adapters(tmp_path / "back", tmp_path / "second", to=to))
    folders.append(convert_adapters(tmp_path / "second", tmp_path / "third", to=to))
    folders.append(save_peft_adapters(adapted, tmp_path / "live"))
    for folder in folders:
        torch.testing.assert_close(load(copy.deepcopy(base), folder)(x), adapted(x), rtol=1e-5, atol=1e-5)
        saved = json.loads((folder / "adapter_config.json").read_text())["modules_to_save"]
        assert sorted(saved) == ["attention", "tokens"]


def test_a_module_of_which_the_file_holds_a_part_is_written_from_the_model_only(tmp_path: Path) -> None:
    base, x, adapted = adapt_tokens("tokens.cls_token")
    adapted.save(tmp_path / "native")
    for to in ("peft-lora", "lora"):
        with pytest.raises(ConfigError, match=r"does not hold tokens\.more\.0, .* call save_peft_adapters"):
            convert_adapters(tmp_path / "native", tmp_path / "out", to=to)
        assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match=r"cls_token was trained fully"):
        convert_adapters(tmp_path / "native", tmp_path / "out", to="vllm")
    save_peft_adapters(adapted, tmp_path / "live")
    torch.testing.assert_close(load(base, tmp_path / "live")(x), adapted(x), rtol=1e-5, atol=1e-5)


def test_a_parameter_of_the_model_itself_is_refused_from_its_file_too(tmp_path: Path) -> None:
    model, x = Heads().eval(), torch.randn(4, 5)
    adapt(model, x, sites=("mix.weight",), exclude=(), trainable=("scale",)).save(tmp_path / "native")
    with pytest.raises(ConfigError, match="scale is a parameter of the model itself and was trained fully"):
        convert_adapters(tmp_path / "native", tmp_path / "out", to="peft-lora")


def test_a_file_that_does_not_tell_parameters_from_buffers_is_refused(tmp_path: Path) -> None:
    _, _, adapted = adapt_tokens("tokens.*")
    adapted.save(tmp_path / "native")
    saved = dataclasses.replace(read_saved_adapters(tmp_path / "native"), trained=None)
    with pytest.raises(ConfigError, match=r"whether tokens\.cls_token is a parameter that was trained or a buffer"):
        convert_to_peft(saved, tmp_path / "out")


def test_a_trained_parameter_beside_an_adapter_in_its_module_is_refused(tmp_path: Path) -> None:
    torch.manual_seed(0)
    adapted = adapt(
        Attention().eval(), torch.randn(2, 5, 8), exclude=("*out_proj*",), trainable=("attention.in_proj_bias",)
    )
    with pytest.raises(ConfigError, match="module attention has parameters that were trained fully and attention has"):
        save_peft_adapters(adapted, tmp_path / "live")
    adapted.save(tmp_path / "native")
    with pytest.raises(ConfigError, match="module attention has parameters that were trained fully and attention has"):
        convert_adapters(tmp_path / "native", tmp_path / "out", to="peft-lora")


def test_rows_and_biases_have_no_place_in_a_converted_folder(tmp_path: Path) -> None:
    net = Net(nn.Embedding(9, 6))
    config = peft.LoraConfig(r=2, target_modules=["mix"], trainable_token_indices={"parts.0": [1]})
    peft.get_peft_model(net, config).save_pretrained(str(tmp_path / "peft"))
    for to in ("native", "peft-lora"):
        with pytest.raises(CheckpointError, match=r"trainable_token_indices at parts\.0\.weight has no place in"):
            convert_adapters(tmp_path / "peft", tmp_path / "out", to=to)
