"""Adapters for mlx-lm: ``adapters.safetensors`` and ``adapter_config.json`` as its ``load_adapters`` reads them.

Its rule (``mlx_lm/tuner/utils.py``, ``lora.py``, ``dora.py``): one rank and one scale for all modules,

    linear      y + scale · (x lora_a) lora_b    with lora_a [in, r], lora_b [r, out]
    embedding   y + scale · lora_a[x] lora_b     with lora_a [entries, r], lora_b [r, features]
    DoRA        m / ‖W + scale · ΔW‖ by output feature

so λ and the scale stand in lora_b, ``scale`` is 1, and modules of a smaller rank are padded with zeros. ``keys`` are
full names, which are looked up in the whole model; ``num_layers`` does not matter for them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.base_config import BaseConfig
from adapter_compiler.saving.exchange.updates import Abilities, WeightUpdate, pad_to_one_rank
from adapter_compiler.saving.layer_kinds import EMBEDDING, LINEAR, LINEAR_OR_CONV1D

ABILITIES = Abilities(
    name="mlx-lm",
    layers=(LINEAR, LINEAR_OR_CONV1D, EMBEDDING),
    taken="weights of linear layers and embeddings",
    rescales=True,
)

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"

#: Types of models whose modules have the same names in mlx-lm as in transformers.
MODEL_TYPES = (
    "cohere",
    "gemma",
    "gemma2",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi",
    "phi3",
    "qwen2",
    "qwen3",
    "stablelm",
    "starcoder2",
)


def write_mlx(updates: Sequence[WeightUpdate], folder: Path, base: BaseConfig) -> None:
    """Write the two files into a folder.

    Raises:
        ConfigError: mlx-lm has other names for the modules of this type of model, or adapts a tied embedding also
            where it is the head.
    """
    _assert_same_names(base)
    padded, rank = pad_to_one_rank(updates)
    tensors: dict[str, torch.Tensor] = {}
    for update in padded:
        _assert_not_tied(update, base)
        tensors |= {f"{update.module}.{name}": value.contiguous().clone() for name, value in _spell(update).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "mlx"})
    text = json.dumps(_make_config(padded, rank), indent=2, sort_keys=True)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def read_mlx(folder: Path, layers: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """ΔW of each weight in float64, by mlx-lm's rule; DoRA's is that before rescaling.

    Args:
        folder: the folder.
        layers: the kind of module of each weight.

    Returns:
        By weight, [out, in]; of an embedding [entries, features].
    """
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))["lora_parameters"]
    tensors = load_file(folder / WEIGHTS)
    found = {}
    for module in config["keys"]:
        delta = config["scale"] * tensors[f"{module}.lora_a"].double() @ tensors[f"{module}.lora_b"].double()
        weight = f"{module}.weight"
        found[weight] = delta if layers.get(weight) == EMBEDDING else delta.t()
    return found


def _spell(update: WeightUpdate) -> Mapping[str, torch.Tensor]:
    if update.layer == EMBEDDING:
        found = {"lora_a": update.left, "lora_b": update.right}
    else:
        found = {"lora_a": update.right.t(), "lora_b": update.left.t()}
    return found if update.magnitude is None else {**found, "m": update.magnitude}


def _make_config(updates: Sequence[WeightUpdate], rank: int) -> dict[str, Any]:
    keys = [update.module for update in updates]
    return {
        "fine_tune_type": "lora" if updates[0].magnitude is None else "dora",
        "num_layers": -1,
        "lora_parameters": {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys},
    }


def _assert_same_names(base: BaseConfig) -> None:
    if base.model_type not in MODEL_TYPES:
        raise ConfigError(
            f"{base.path}: models of the type {base.model_type!r} have other names of modules in mlx-lm, or none; "
            f"expected one of {', '.join(MODEL_TYPES)}; fold the adapters into the base with fold_files and convert "
            "the model"
        )


def _assert_not_tied(update: WeightUpdate, base: BaseConfig) -> None:
    if update.layer == EMBEDDING and base.is_tied:
        raise ConfigError(
            f"{update.weight} is an embedding that the head is tied to in {base.path}: mlx-lm would adapt the head as "
            "well; fold the adapters into the base with fold_files"
        )
