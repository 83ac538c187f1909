"""Folders of peft as further adapters of a model in memory, which says what the folders leave open."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.exchange.convert import convert_adapters
from passes.compat import pytree
from tests.interop.peft_cells import LAYERS, Net, write_with_peft

SQUARE, WIDE = (8, 8), (8, 4)
OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {},
    "a rank above the weight's": {"r": 10},
    "dora": {"use_dora": True},
    "modules_to_save": {"modules_to_save": ["head"]},
    "adalora": {"init_r": 3, "target_r": 2, "total_step": 10},
}
TOGETHER = (
    ("linear", "Conv1D"),
    ("Conv1D", "linear", "linear without bias"),
    ("attention", "linear", "embedding", "conv2d"),
    ("two stacks", "linear"),
)


def adapt(layers: tuple[str, ...], size: tuple[int, int]) -> ac.AdaptedModel:
    net = Net(layers, *size).eval()
    config = ac.AdapterConfig(rank=1, sites=("*",), exclude=("head.*",), trainable=("head.*",))
    return ac.compile_with_adapters(net, (net.inputs,), config=config)


def assert_loads(layers: tuple[str, ...], size: tuple[int, int], options: dict[str, Any], folder: Path) -> bool:
    written = write_with_peft(layers, size, options, folder)
    if written is None:
        return False
    adapted = adapt(layers, size)
    adapted.load_adapter("peft", written.path)
    adapted.use("peft")
    torch.testing.assert_close(adapted(), written.outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted.fold()(), written.outputs, rtol=1e-5, atol=1e-5)
    return True


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "groups"])
def test_each_layer(layer: str, size: tuple[int, int], tmp_path: Path) -> None:
    taken = 0
    for number, (option, values) in enumerate(OPTIONS.items()):
        (tmp_path / str(number)).mkdir()
        if option != "dora" or layer != "embedding":
            taken += assert_loads((layer,), size, values, tmp_path / str(number))
    assert taken >= 3


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("layers", TOGETHER, ids=", ".join)
def test_layers_together(layers: tuple[str, ...], size: tuple[int, int], tmp_path: Path) -> None:
    assert assert_loads(layers, size, {}, tmp_path)


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        ("groups", {}, "has 2 groups: in a grouped convolution"),
        ("linear", {"lora_bias": True}, r"lora_bias at parts\.part0\.bias has no place in a model's adapter"),
        ("embedding", {"trainable_token_indices": {"part0": [1]}, "target_modules": ["head"]}, "trainable_token_ind"),
        ("embedding", {"use_dora": True}, r"site parts\.part0\.weight was saved for a weight of shape"),
        ("linear", {"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_of_a_weight_is_named(
    layer: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    written = write_with_peft((layer,), WIDE, options, tmp_path)
    assert written is not None
    adapted = adapt((layer,), WIDE)
    with pytest.raises(CheckpointError, match=message):
        adapted.load_adapter("peft", written.path)
    assert adapted.adapter_names == ("default",)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(9, 6), nn.Linear(6, 9, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.embed(ids).tanh())
        return y


def test_an_adapter_of_one_name_of_a_tied_weight(tmp_path: Path) -> None:
    ids = torch.arange(6)
    wrapped: Any = peft.get_peft_model(
        Tied(), peft.LoraConfig(r=2, target_modules=["head"], init_lora_weights=False)
    ).eval()
    wrapped.save_pretrained(str(tmp_path))
    adapted = ac.compile_with_adapters(Tied().eval(), (ids,), config=ac.AdapterConfig(rank=2, sites=("*",)))
    with pytest.raises(CheckpointError, match=r"head\.weight and embed\.weight are tied in this model, .* untie="):
        adapted.load_adapter("peft", tmp_path)
    config = ac.AdapterConfig(rank=2, sites=("*",), untie=("head.weight",))
    untied = ac.compile_with_adapters(Tied().eval(), (ids,), config=config)
    untied.load_adapter("peft", tmp_path)
    untied.use("peft")
    torch.testing.assert_close(untied(ids), wrapped(ids), rtol=1e-5, atol=1e-5)


def test_a_newer_peft_is_not_trusted_with_an_attention(tmp_path: Path) -> None:
    """Up to 0.21.2, peft adds the update of out_proj twice; what later versions do is not known."""
    written = write_with_peft(("attention",), SQUARE, {}, tmp_path)
    assert written is not None
    path = written.path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "peft_version": "0.22.0"}))
    adapted = adapt(("attention",), SQUARE)
    with pytest.raises(CheckpointError, match=r"this nn\.MultiheadAttention was trained with PEFT"):
        adapted.load_adapter("peft", written.path)
    del config["peft_version"]
    path.write_text(json.dumps(config))
    adapted.load_adapter("peft", written.path)


@pytest.mark.parametrize("layers", [("linear", "Conv1D"), ("attention", "embedding"), ("experts",)], ids=", ".join)
def test_a_model_made_from_a_folder(layers: tuple[str, ...], tmp_path: Path) -> None:
    written = write_with_peft(layers, SQUARE, {"modules_to_save": ["head"]}, tmp_path)
    assert written is not None
    adapted = ac.load(Net(layers, *SQUARE).eval(), written.path)
    torch.testing.assert_close(adapted(), written.outputs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("converts", [False, True], ids=["PEFT's folder", "converted"])
@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
def test_dora_of_an_embedding(size: tuple[int, int], converts: bool, tmp_path: Path) -> None:
    """Its magnitude has a value for each column of the weight, where ours has one for each row."""
    written = write_with_peft(("embedding",), size, {"use_dora": True}, tmp_path)
    assert written is not None
    folder = written.path
    if converts:
        folder = tmp_path / "native"
        convert_adapters(written.path, folder, to="native")
    net = Net(("embedding",), *size).eval()
    adapted = ac.load(net, folder, example_args=(net.inputs,))
    torch.testing.assert_close(adapted(), written.outputs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted.fold()(), written.outputs, rtol=1e-5, atol=1e-5)
    outputs = pytree.tree_leaves(adapted.capture(net.inputs)(*net.inputs))
    torch.testing.assert_close(outputs, written.outputs, rtol=1e-5, atol=1e-5)


def test_a_model_is_not_made_from_rows(tmp_path: Path) -> None:
    options = {"trainable_token_indices": {"part0": [1]}, "target_modules": ["head"]}
    written = write_with_peft(("embedding",), WIDE, options, tmp_path)
    assert written is not None
    with pytest.raises(CheckpointError, match=r"trainable_token_indices at parts\.part0\.weight has no place"):
        ac.load(Net(("embedding",), *WIDE), written.path)
