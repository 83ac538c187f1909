"""Adapters as a plain LoRA folder in PEFT's layout, for readers that know neither patterns nor DoRA, such as vLLM.

Their rule (loralib; ``PEFTHelper`` in ``vllm/lora/peft_helper.py``): one ``lora_alpha`` / ``r`` for all modules,
whatever ``rank_pattern`` and ``alpha_pattern`` say. So all modules have one rank, padded with zeros, and alpha is the
rank: the scale is 1. vLLM also refuses ``modules_to_save`` and has no adapters of biases; its adapters of embeddings
depend on the model and are refused here.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from adapter_compiler.saving.exchange.updates import Abilities
from adapter_compiler.saving.folders.peft_format.config import PEFT_CONFIG
from adapter_compiler.saving.folders.peft_format.notes import PEFT_WEIGHTS
from adapter_compiler.saving.folders.peft_format.tensors import PEFT_PREFIX
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.folders.write_peft import convert_to_peft
from adapter_compiler.saving.layer_kinds import CONVOLUTIONS, EMBEDDING, LINEAR, LINEAR_OR_CONV1D

LORA = Abilities(
    name="plain LoRA",
    layers=(LINEAR, LINEAR_OR_CONV1D, EMBEDDING, *CONVOLUTIONS.values()),
    taken="weights of linear layers, embeddings, and convolutions without groups and dilation",
    trains=True,
)

VLLM = Abilities(name="vLLM", layers=(LINEAR, LINEAR_OR_CONV1D), taken="weights of linear layers")

_LEFT, _RIGHT = ".lora_B.weight", ".lora_A.weight"
_EMBEDDING_LEFT, _EMBEDDING_RIGHT = ".lora_embedding_B", ".lora_embedding_A"


def write_lora(saved: SavedAdapters, folder: Path) -> None:
    """Write the two files into a folder.

    Raises:
        ConfigError: PEFT's layout has no place for a site, or for what was trained besides.
    """
    convert_to_peft(saved, folder, ranks="one")


def read_lora(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW [out, in] of each weight in float64, by the rule of one alpha / r; of an embedding [entries, features]."""
    config = json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
    tensors = load_file(folder / PEFT_WEIGHTS)
    scale = config["lora_alpha"] / config["r"]
    found = {}
    for name, left in tensors.items():
        key = name.removeprefix(PEFT_PREFIX)
        if key.endswith(_LEFT):
            right = tensors[name.removesuffix(_LEFT) + _RIGHT]
            found[key.removesuffix(_LEFT) + ".weight"] = scale * left.flatten(1).double() @ right.flatten(1).double()
        elif key.endswith(_EMBEDDING_LEFT):
            right = tensors[name.removesuffix(_EMBEDDING_LEFT) + _EMBEDDING_RIGHT]
            found[key.removesuffix(_EMBEDDING_LEFT) + ".weight"] = scale * (left.double() @ right.double()).t()
    return found
