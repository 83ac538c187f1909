"""ΔW of each weight as the reader of a format would compute it, from what was written for that reader."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.base_config import BaseConfig
from adapter_compiler.saving.exchange.targets import diffusers, gguf, lora_folder, mlx, ort
from adapter_compiler.saving.exchange.updates import EVERYTHING, find_updates
from adapter_compiler.saving.folders.read_folder import read_saved_adapters


def read_back(adapter: Path, manifest: Mapping[str, Any], config: BaseConfig | None) -> dict[str, torch.Tensor]:
    """ΔW of each weight in float64, in transformers' order of rows; DoRA's is that before rescaling.

    Args:
        adapter: the folder or the file.
        manifest: what stands beside it.
        config: the configuration of the base model, which GGUF needs.

    Returns:
        By weight, [out, in]; of an embedding [entries, features].

    Raises:
        ConfigError: the configuration of the base model is missing.
        CheckpointError: the adapter is damaged.
    """
    target = manifest["target"]
    layers = {name: weight["layer"] for name, weight in manifest["weights"].items()}
    if target.startswith("peft"):
        return {update.weight: update.delta() for update in find_updates(read_saved_adapters(adapter), EVERYTHING)}
    if target == "mlx":
        return mlx.read_mlx(adapter, layers)
    if target == "diffusers":
        return diffusers.read_diffusers(adapter, str(manifest["component"]))
    if target == "ort":
        return ort.read_ort(adapter)
    if target == "gguf":
        if config is None:
            raise ConfigError(
                f"{adapter} is verified without a base model, but its names and rows are those of llama.cpp; expected "
                "the folder of the base model with its config.json; give it with --base (base= in Python)"
            )
        return gguf.read_gguf(adapter, config, layers)
    return lora_folder.read_lora(adapter)
