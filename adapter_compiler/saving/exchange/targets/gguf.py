"""Adapters for llama.cpp: one GGUF file with ``lora_a`` and ``lora_b`` for each tensor of the base.

Its rule (``src/llama-adapter.h``): a tensor's scale is alpha / r with r of that tensor, and 1 if alpha is 0. One alpha
with different ranks would scale each tensor differently, so alpha is 0 here, and λ and the scale stand in ``lora_b``.
The layout (``src/llama-adapter.cpp``, ``convert_lora_to_gguf.py``):

    linear      lora_a [r, in], lora_b [out, r]
    embedding   lora_a [entries, r], lora_b [features, r]

Names and layouts of the base are those of llama.cpp's converter: see
:mod:`~adapter_compiler.saving.exchange.targets.gguf_names`.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch

from adapter_compiler.errors import MissingDependencyError
from adapter_compiler.saving.exchange.base_config import BaseConfig
from adapter_compiler.saving.exchange.targets.gguf_names import GgufNames
from adapter_compiler.saving.exchange.updates import Abilities, WeightUpdate
from adapter_compiler.saving.layer_kinds import EMBEDDING, LINEAR, LINEAR_OR_CONV1D

ABILITIES = Abilities(
    name="llama.cpp",
    layers=(LINEAR, LINEAR_OR_CONV1D, EMBEDDING),
    taken="weights of linear layers and of the embedding of tokens",
)

#: By the name of the key what :func:`write_gguf` writes; llama.cpp refuses other values of the first two.
_TEXTS = {"general.type": "adapter", "adapter.type": "lora"}
_ALPHA = "adapter.lora.alpha"


def write_gguf(updates: Sequence[WeightUpdate], path: Path, base: BaseConfig) -> None:
    """Write the file.

    Raises:
        MissingDependencyError: the package ``gguf`` is missing.
        ConfigError: llama.cpp has no place for a weight.
    """
    gguf = import_gguf()
    names = GgufNames.find(gguf, base)
    tensors = [pair for update in updates for pair in _spell(update, names)]
    writer = gguf.GGUFWriter(str(path), names.architecture)
    for key, text in _TEXTS.items():
        writer.add_string(key, text)
    writer.add_float32(_ALPHA, 0.0)
    for name, tensor in tensors:
        writer.add_tensor(name, numpy.ascontiguousarray(tensor.float().numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_gguf(path: Path, base: BaseConfig, layers: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """ΔW of each weight in float64, by llama.cpp's rule, in transformers' order of rows.

    Args:
        path: the file.
        base: the configuration of the base model.
        layers: the kind of module of each weight.

    Returns:
        By weight, [out, in]; of an embedding [entries, features].
    """
    gguf = import_gguf()
    names = GgufNames.find(gguf, base)
    reader = gguf.GGUFReader(str(path))
    alpha = float(reader.get_field(_ALPHA).contents())
    tensors = {one.name: torch.from_numpy(numpy.array(one.data)).double() for one in reader.tensors}
    found = {}
    for weight, layer in layers.items():
        name = names.name_of(weight)
        if f"{name}.lora_a" in tensors:
            found[weight] = _multiply(tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"], alpha, layer)
            found[weight] = names.restore_rows(weight, found[weight])
    return found


def import_gguf() -> Any:
    """The package ``gguf``, which llama.cpp publishes.

    Raises:
        MissingDependencyError: it is not installed.
    """
    try:
        return importlib.import_module("gguf")
    except ImportError as error:
        raise MissingDependencyError(
            f"GGUF files need the package gguf, which cannot be imported ({error}); install adapter-compiler[gguf]"
        ) from error


def _multiply(a: torch.Tensor, b: torch.Tensor, alpha: float, layer: str) -> torch.Tensor:
    scale = alpha / b.shape[1] if alpha else 1.0
    return scale * (a @ b.t() if layer == EMBEDDING else b @ a)


def _spell(update: WeightUpdate, names: GgufNames) -> list[tuple[str, torch.Tensor]]:
    name = names.name_of(update.weight)
    if update.layer == EMBEDDING:
        names.assert_embedding_alone(update.weight)
        return [(f"{name}.lora_a", update.left), (f"{name}.lora_b", update.right.t())]
    return [(f"{name}.lora_a", update.right), (f"{name}.lora_b", names.permute_rows(update.weight, update.left))]
