"""Every option of peft with every kind of layer: our folding gives peft's numbers, or names what it cannot read.

Each cell is a net of one or more layers, square or not, that peft wraps with one option. peft's adapters get random
values, peft saves its folder, and the folder is folded into the base file. The outputs of the folded net must be those
of peft's. Where a folder is refused, the message must name the field or layer that is expected to be refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import config as lora_config
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.config.peft_options import ELSEWHERE, WITHOUT_EFFECT
from adapter_compiler.errors import AdapterCompilerError, CheckpointError, ConfigError
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folders.peft_format.fields import APPLIED, HARMLESS, REFUSED
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folding.fold_files import fold_files
from tests.interop.peft_cells import LAYERS, measure_difference, randomize, write_with_peft

SQUARE, WIDE = (8, 8), (8, 4)

#: Options that are read for some layers at least.
READ: dict[str, dict[str, Any]] = {
    "plain": {},
    "a rank above the weight's": {"r": 10},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "dora and rslora": {"use_dora": True, "use_rslora": True},
    "rank_pattern": {"rank_pattern": {"part0": 4, "part1": 6}},
    "alpha_pattern": {"alpha_pattern": {"part0": 7, r"parts\.part1": 5}},
    "patterns and rslora": {"rank_pattern": {".*0": 4}, "alpha_pattern": {"^parts.part0": 7}, "use_rslora": True},
    "fan_in_fan_out": {"fan_in_fan_out": True},
    "bias=all": {"bias": "all"},
    "bias=lora_only": {"bias": "lora_only"},
    "lora_bias": {"lora_bias": True},
    "lora_bias and bias": {"lora_bias": True, "bias": "all"},
    "modules_to_save": {"modules_to_save": ["head"]},
    "modules_to_save with biases": {"modules_to_save": ["block"], "bias": "all"},
    "lora_dropout": {"lora_dropout": 0.1},
    "exclude_modules": {"exclude_modules": ["part1"]},
    "trainable_token_indices": {
        "trainable_token_indices": {"part0": [1, 3]}, "target_modules": ["head"], "target_parameters": None
    },
    "ensure_weight_tying": {"ensure_weight_tying": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
    "random": {"init_lora_weights": False},
    "velora": {"velora_config": {"num_groups": 2}},
    "monteclora": {"monteclora_config": lora_config.MontecloraConfig()},
    "adalora": {"init_r": 3, "target_r": 2, "total_step": 10},
    "adalora with fields of lora": {
        "init_r": 5, "target_r": 2, "total_step": 10, "lora_alpha": 1, "use_rslora": True, "alpha_pattern": {"part0": 9}
    },
}  # fmt: skip

#: Options that are refused, whatever the layers are, and what the message must name.
NEVER: dict[str, tuple[dict[str, Any], str]] = {
    "contradicting patterns": ({"alpha_pattern": {".*part0.*": 7, ".*": 5}}, "alpha_pattern"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    "pissa by a randomized svd": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights='pissa_niter_4'"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights='olora'"),
    "lora_ga": ({"init_lora_weights": "lora_ga", "lora_ga_config": peft.LoraGAConfig()}, "init_lora_weights='lora_ga'"),
    "bdlora": (
        {"use_bdlora": lora_config.BdLoraConfig(target_modules_bd_a=["part0"], nblocks=2, match_strict=False)},
        "use_bdlora",
    ),
    "kasa": ({"kasa_config": lora_config.KasaConfig()}, "kasa_config"),
    "alora": ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
}

TOGETHER = (
    ("linear", "Conv1D"),
    ("Conv1D", "linear"),
    ("linear", "linear"),
    ("linear", "linear without bias", "linear without bias"),
    ("linear without bias", "Conv1D"),
    ("linear", "embedding"),
    ("attention", "linear"),
    ("attention", "attention"),
    ("Conv1D", "attention"),
    ("linear", "experts"),
    ("conv2d", "linear", "embedding", "attention", "conv1d"),
)

FEW = ("plain", "rslora", "dora", "patterns and rslora", "bias=all", "lora_bias", "modules_to_save", "adalora")


def find_refused_layer(layers: tuple[str, ...], size: tuple[int, int], option: str) -> str | None:
    """What a message must name for layers that cannot be read with an option that can; ``None`` if they are read."""
    linear = [layer for layer in layers if layer in ("linear", "linear without bias", "Conv1D")]
    biased = [layer for layer in linear if layer != "linear without bias"]
    # fan_in_fan_out is that of the last one; a layer without bias is no Conv1D.
    is_open = len(biased) > 1 or (len(linear) > len(biased) == 1 and linear[-1] != "Conv1D")
    if "groups" in layers:
        return "groups"
    if "attention" in layers and ("lora_bias" in option or option == "fan_in_fan_out" or "Conv1D" in layers):
        return "MultiheadAttention"
    if size == SQUARE and is_open:
        return "fan_in_fan_out"
    if "two stacks" in layers or (size == SQUARE and "xperts" in str(layers)):
        return "target_parameters"
    if option == "trainable_token_indices" and layers[0] == "linear":  # with a bias, which peft forgets
        return "trainable_token_indices"
    return "lora_bias" if "lora_bias" in option and "without bias" in str(layers) else None


def check_cell(layers: tuple[str, ...], size: tuple[int, int], option: str, folder: Path) -> str | None:
    """What is wrong with a cell; ``""`` if peft does not take it, ``None`` if it is right."""
    values, name = NEVER[option] if option in NEVER else (READ[option], None)
    names = [one for one in (name, find_refused_layer(layers, size, option)) if one]
    folder.mkdir()
    written = write_with_peft(layers, size, values, folder)
    if written is None:
        return ""
    try:
        difference = measure_difference(written, layers, size, folder / "out.safetensors")
    except AdapterCompilerError as error:
        is_named = any(one in str(error) for one in names)
        return None if is_named else f"{option}: refused with {error}, expected {names or 'the numbers of peft'}"
    if names:
        return f"{option}: read with a difference of {difference}, expected an error that names {names}"
    return None if difference < 1e-5 else f"{option}: the outputs differ by {difference}"


def check_cells(layers: tuple[str, ...], size: tuple[int, int], options: tuple[str, ...], folder: Path) -> int:
    """The number of cells that peft takes, all of which are right."""
    found = [check_cell(layers, size, option, folder / str(number)) for number, option in enumerate(options)]
    wrong = [text for text in found if text]
    assert not wrong, f"{layers} of {size}:\n" + "\n".join(wrong)
    return found.count(None)


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("layer", LAYERS)
def test_each_layer_with_each_option(layer: str, size: tuple[int, int], tmp_path: Path) -> None:
    count = check_cells((layer,), size, (*READ, *NEVER), tmp_path)
    assert count >= 12, "peft takes too few options for this layer, so that the table says little"


@pytest.mark.parametrize("size", [SQUARE, WIDE], ids=["square", "wide"])
@pytest.mark.parametrize("layers", TOGETHER, ids=", ".join)
def test_layers_together(layers: tuple[str, ...], size: tuple[int, int], tmp_path: Path) -> None:
    assert check_cells(layers, size, FEW, tmp_path) >= 4


MIXED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(8, 8),
    "wide linear": lambda: nn.Linear(8, 5),
    "no bias": lambda: nn.Linear(8, 8, bias=False),
    "Conv1D": lambda: Conv1D(8, 8),
    "wide Conv1D": lambda: Conv1D(5, 8),
}


@pytest.mark.parametrize("converts", [False, True], ids=["PEFT's folder", "converted"])
def test_square_and_wide_layers_of_two_layouts(converts: bool, tmp_path: Path) -> None:
    """A square matrix with a bias may be that of a Linear or of a Conv1D, whatever the others are."""
    count = dict.fromkeys(("right", "refused"), 0)
    for number, layers in enumerate(itertools.product(MIXED, MIXED)):
        folder = tmp_path / str(number)
        folder.mkdir()
        net = nn.ModuleList([MIXED[layer]() for layer in layers]).eval()
        save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, folder / "base.safetensors")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wrapped: Any = peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0", "1"]))
        randomize(wrapped)
        wrapped.save_pretrained(str(folder / "adapters"))
        expected = wrapped.merge_and_unload().state_dict()
        source = folder / "adapters"
        if converts:
            source = folder / "native"
            convert_adapters(folder / "adapters", source, to="native")
        try:
            fold_files(folder / "base.safetensors", source, folder / "out.safetensors")
        except CheckpointError as error:
            assert "may be that of a Linear or of a Conv1D" in str(error)
            assert "linear" in layers or "Conv1D" in layers
            count["refused"] += 1
            continue
        found = load_file(folder / "out.safetensors")
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=f"{layers}: {name}")
        count["right"] += 1
    assert count == {"right": 12, "refused": 13}


def test_every_field_of_peft_is_known() -> None:
    """A new field of peft makes this fail: put it into one of the tables, or teach the reader what it means."""
    fields = {field.name for kind in (peft.LoraConfig, peft.AdaLoraConfig) for field in dataclasses.fields(kind)}
    tables = [*APPLIED, *HARMLESS, *REFUSED]
    assert fields == set(tables)
    assert len(tables) == len(set(tables))
    for config in (peft.LoraConfig(), peft.AdaLoraConfig(total_step=1)):
        for name, (default, _) in REFUSED.items():
            assert getattr(config, name) == default


def test_every_start_of_peft_is_known(tmp_path: Path) -> None:
    hint = typing.get_type_hints(peft.LoraConfig)["init_lora_weights"]
    names = [name for part in typing.get_args(hint) for name in typing.get_args(part)]
    assert {"gaussian", "pissa", "mica"} <= set(names)
    for name in names:
        write_folder(tmp_path, init_lora_weights=name.replace("[number of iters]", "4"))
        try:
            read_saved_adapters(tmp_path)
        except CheckpointError as error:
            assert "changed the base weights" in str(error)


def test_every_option_of_peft_is_accepted_or_refused_by_name() -> None:
    aliases = ("r", "init_r", "lora_alpha", "orth_reg_weight", "target_modules", "exclude_modules", "modules_to_save")
    translated = ("use_dora", "use_rslora", "init_lora_weights")
    fields = {field.name for kind in (peft.LoraConfig, peft.AdaLoraConfig) for field in dataclasses.fields(kind)}
    assert fields == {*aliases, *translated, *WITHOUT_EFFECT, *ELSEWHERE}
    make: Any = AdapterConfig
    for name in WITHOUT_EFFECT:
        assert make(**{name: True}) == AdapterConfig()
    for name, (default, _) in ELSEWHERE.items():
        assert make(**{name: default}) == AdapterConfig()
        with pytest.raises(ConfigError, match=rf"AdapterConfig\({name}='x'\) is an option of PEFT's, expected "):
            make(**{name: "x"})
    for kind in (peft.LoraConfig(), peft.AdaLoraConfig(total_step=1)):
        defaults = {field.name: getattr(kind, field.name) for field in dataclasses.fields(kind)}
        found = {name: defaults[name] for name in ELSEWHERE if name in defaults and name != "total_step"}
        assert all(not value or value == ELSEWHERE[name][0] for name, value in found.items())


def write_folder(folder: Path, **fields: Any) -> None:
    """A folder of peft with other values of some fields."""
    if not (folder / "adapters").exists():
        assert write_with_peft(("linear",), WIDE, {}, folder) is not None
    config = json.loads((folder / "adapters" / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    weights = (folder / "adapters" / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(weights)


@pytest.mark.parametrize("field", REFUSED)
def test_a_refused_field_is_named_unless_it_is_empty(field: str, tmp_path: Path) -> None:
    values: tuple[Any, ...] = (None, False, [], {})
    for empty in values:
        write_folder(tmp_path, **{field: empty})
        assert list(read_saved_adapters(tmp_path).adapters) == ["parts.part0.weight"]
    write_folder(tmp_path, **{field: {"x": 1}})
    with pytest.raises(CheckpointError, match=re.escape(f"adapter_config.json: {field}={{'x': 1}}: ")):
        read_saved_adapters(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is IA3, expected LORA or ADALORA"),
        ({"use_moe": True}, "use_moe=True: this field is unknown here"),
        ({"use_dora": True}, "lacks its lora_magnitude_vector"),
        ({"use_dora": 1}, "use_dora is 1, expected true or false"),
        ({"r": 3}, "r=3: module parts.part0 has rank 2, expected 3"),
        ({"r": 0}, "r is 0, expected a rank of at least 1"),
        ({"rank_pattern": {"part0": 3}}, "module parts.part0 has rank 2, expected 3"),
        ({"rank_pattern": {"part0": [True]}}, "rank_pattern=.* expected ranks"),
        ({"alpha_pattern": {"(": 3}}, "no regular expression"),
        ({"lora_alpha": None}, "lora_alpha is None, expected a finite number"),
        ({"bias": "some"}, "bias is 'some', expected 'none', 'all' or 'lora_only'"),
        ({"init_lora_weights": "corda"}, "init_lora_weights='corda': this start changed the base weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights='loftq': this start changed the base weights"),
        ({"init_lora_weights": "other"}, "init_lora_weights='other': this start is unknown"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices=.* the file has no rows of the embedding"),
        ({"peft_type": "ADALORA"}, "lacks its lora_E"),
        ({"peft_type": "ADALORA", "use_dora": True}, "use_dora=True: PEFT's AdaLoRA does not have this"),
        ({"target_parameters": ["part0.weight"], "peft_type": "ADALORA"}, "target_parameters=.* does not have this"),
    ],
)
def test_values_that_cannot_be_read_are_named(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_folder(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        read_saved_adapters(tmp_path)
