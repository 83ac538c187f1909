"""The tables of architectures agree with the packages that the other run times come from."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.base_config import BaseConfig
from adapter_compiler.saving.exchange.targets import mlx
from adapter_compiler.saving.exchange.targets.gguf_names import ARCHITECTURES, GgufNames

SIZES: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def make_config(architecture: str) -> PreTrainedConfig:
    kind = getattr(transformers, architecture).config_class
    sizes = {"n_embd": 16, "n_head": 4, "n_layer": 2, "vocab_size": 32} if "GPT2" in architecture else SIZES
    config: PreTrainedConfig = kind(**sizes)
    config.architectures = [architecture]
    return config


def make_model(config: PreTrainedConfig) -> nn.Module:
    (architecture,) = config.architectures or []
    with torch.device("meta"):
        model: nn.Module = getattr(transformers, architecture)(config)
    return model


def read_base(config: PreTrainedConfig) -> BaseConfig:
    return BaseConfig(path=Path("config.json"), values=config.to_dict())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_llama_cpp_has_a_place_for_every_matrix_of_a_block(architecture: str) -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    config = make_config(architecture)
    names = GgufNames.find(gguf, read_base(config))
    matrices = [name for name, weight in make_model(config).named_parameters() if weight.dim() == 2]
    blocks = [name for name in matrices if ".layers." in name or ".h." in name]
    found = [names.name_of(name) for name in blocks]
    assert len(set(found)) == len(blocks) >= 8
    assert all(name.startswith(("blk.0.", "blk.1.")) for name in found)


def test_an_unknown_architecture_and_an_unknown_weight_are_refused() -> None:
    gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")
    values = {**make_config("LlamaForCausalLM").to_dict(), "architectures": ["WeirdForCausalLM"]}
    with pytest.raises(ConfigError, match="weights of 'WeirdForCausalLM' is not known here"):
        GgufNames.find(gguf, BaseConfig(path=Path("config.json"), values=values))
    names = GgufNames.find(gguf, read_base(make_config("LlamaForCausalLM")))
    for weight in ("score.weight", "model.norm.weight", "model.layers.7.self_attn.q_proj.weight"):
        with pytest.raises(ConfigError, match=r"llama\.cpp adds no adapters to this weight"):
            names.name_of(weight)


@pytest.mark.parametrize("model_type", mlx.MODEL_TYPES)
def test_modules_have_the_same_names_in_mlx_lm(model_type: str) -> None:
    loader = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    module = importlib.import_module(f"mlx_lm.models.{loader.MODEL_REMAPPING.get(model_type, model_type)}")
    utils = pytest.importorskip("mlx.utils", reason="mlx is not installed")
    config = AutoConfig.for_model(model_type, **SIZES)
    config.architectures = [transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]]
    values = {**config.to_dict(), **(getattr(config, "rope_parameters", None) or {}), "model_type": model_type}
    values["rope_scaling"] = None
    model = module.Model(module.ModelArgs.from_dict(values))
    shapes = {name: tuple(value.shape) for name, value in utils.tree_flatten(model.parameters())}
    ours = [(name, tuple(p.shape)) for name, p in make_model(config).named_parameters() if p.dim() == 2]
    assert {name: shapes.get(name) for name, _ in ours if "lm_head" not in name} == {
        name: shape for name, shape in ours if "lm_head" not in name
    }


def test_mlx_refuses_other_types_of_models() -> None:
    values = {**make_config("GPT2LMHeadModel").to_dict()}
    with pytest.raises(ConfigError, match="models of the type 'gpt2' have other names of modules in mlx-lm"):
        mlx.write_mlx([], Path("unused"), BaseConfig(path=Path("config.json"), values=values))
