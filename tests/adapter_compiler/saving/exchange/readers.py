"""Readers of each format, written from the other run time's rule and from nothing of this library.

Each returns ΔW [out, in] by the name of transformers' weight.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Updates = dict[str, torch.Tensor]


def read_as_vllm(folder: Path) -> Updates:
    """vLLM keeps these fields of the configuration and no patterns; B is multiplied by alpha / r, or by alpha / √r."""
    fields = ("r", "lora_alpha", "target_modules", "bias", "modules_to_save", "use_rslora", "use_dora")
    config = {key: value for key, value in _read_json(folder / "adapter_config.json").items() if key in fields}
    assert not config.get("modules_to_save"), "vLLM only supports modules_to_save being None."
    assert not config.get("use_dora"), "vLLM does not yet support DoRA."
    rank = config["r"]
    scale = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    halves: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(folder / "adapter_model.safetensors").items():
        parts = name.split(".")
        assert parts[:2] == ["base_model", "model"] and parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B")
        assert rank == tensor.shape[0 if parts[-2] == "lora_A" else 1], "slots of one rank for the whole adapter"
        halves.setdefault(".".join(parts[2:-2]), {})[parts[-2]] = tensor.double()
    return {f"{module}.weight": scale * pair["lora_B"] @ pair["lora_A"] for module, pair in halves.items()}


def read_as_mlx(folder: Path) -> Updates:
    """mlx-lm: y + scale (x lora_a) lora_b, the same rank and scale in every layer that ``keys`` names."""
    config = _read_json(folder / "adapter_config.json")
    assert config["fine_tune_type"] == "lora"
    options, tensors = config["lora_parameters"], load_file(folder / "adapters.safetensors")
    found = {}
    for module in options["keys"]:
        a, b = tensors.pop(f"{module}.lora_a").double(), tensors.pop(f"{module}.lora_b").double()
        assert a.shape[1] == b.shape[0] == options["rank"]
        found[f"{module}.weight"] = (options["scale"] * a @ b).T
    assert not tensors
    return found


#: llama.cpp's names of a block's tensors.
_GGUF_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_as_llama_cpp(path: Path, heads: int, key_heads: int) -> Updates:
    """llama.cpp: scale = alpha / b's rank, or 1 without alpha; queries and keys as Meta's checkpoints have them."""
    import gguf

    reader = gguf.GGUFReader(path)
    assert _text(reader, "general.type") == "adapter" and _text(reader, "adapter.type") == "lora"
    assert _text(reader, "general.architecture") == "llama"
    field = reader.get_field("adapter.lora.alpha")
    assert field is not None
    alpha = float(field.contents())
    tensors = {one.name: torch.tensor(one.data).double() for one in reader.tensors}
    found = {}
    for name in [name for name in tensors if name.endswith(".lora_a")]:
        tensor = name.removesuffix(".lora_a")
        a, b = tensors[name], tensors[f"{tensor}.lora_b"]
        scale = alpha / b.shape[1] if alpha else 1.0
        if tensor == "token_embd.weight":
            found["model.embed_tokens.weight"] = scale * a @ b.T
            continue
        if tensor == "output.weight":
            found["lm_head.weight"] = scale * b @ a
            continue
        matched = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensor)
        assert matched, tensor
        module = _GGUF_NAMES[matched[2]]
        count = {"self_attn.q_proj": heads, "self_attn.k_proj": key_heads}.get(module)
        delta = scale * b @ a
        found[f"model.layers.{matched[1]}.{module}.weight"] = delta if count is None else _as_transformers(delta, count)
    return found


def _as_transformers(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """The permutation of transformers' ``convert_llama_weights_to_hf.py``."""
    out, width = rows.shape
    return rows.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def read_as_diffusers(folder: Path, component: str, *, before_august_2026: bool) -> Updates:
    """diffusers: the scale is 1; before, it was the first rank (as r and alpha of all) by the module's own."""
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    own = {name.removeprefix(f"{component}."): tensor.double() for name, tensor in tensors.items()}
    assert len(own) == len(tensors) and all(name.startswith(f"{component}.") for name in tensors)
    ranks = {name: tensor.shape[1] for name, tensor in own.items() if "lora_B" in name}
    alpha = next(iter(ranks.values())) if before_august_2026 else Counter(ranks.values()).most_common()[0][0]
    found = {}
    for name, rank in ranks.items():
        scale = alpha / rank if before_august_2026 else 1.0
        right = own[name.replace("lora_B", "lora_A")]
        found[name.replace("lora_B.", "")] = scale * own[name].flatten(1) @ right.flatten(1)
    return found


def _read_json(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _text(reader: Any, key: str) -> str:
    return str(reader.get_field(key).contents())
