"""Llama models of several sizes with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

#: By billions of weights: the options of ``LlamaConfig``. "tiny" is for trying a script.
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 64, "layers": 2, "inner": 128, "heads": 4, "shared": 2, "words": 512},
    "0.2": {"hidden": 896, "layers": 12, "inner": 4864, "heads": 14, "shared": 2, "words": 8000},
    "0.5": {"hidden": 1024, "layers": 28, "inner": 4096, "heads": 16, "shared": 8, "words": 32000},
    "1.2": {"hidden": 2048, "layers": 16, "inner": 8192, "heads": 32, "shared": 8, "words": 128256},
    "8": {"hidden": 4096, "layers": 32, "inner": 14336, "heads": 32, "shared": 8, "words": 128256},
}


def make_model(size: str, dtype: torch.dtype, device: torch.device | str, *, attention: str | None = None) -> nn.Module:
    """A model in training mode; its embeddings are tied, but for the 8 B shape.

    Args:
        size: a key of :data:`SHAPES`.
        dtype: of the weights.
        device: where they are.
        attention: transformers' name of an implementation; its own choice by default.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = SHAPES[size]
    config = LlamaConfig(
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        intermediate_size=shape["inner"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["shared"],
        vocab_size=shape["words"],
        tie_word_embeddings=size != "8",
        use_cache=False,
        attn_implementation=attention,
    )
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return model.to(dtype).train()


def make_batch(model: nn.Module, batch: int, length: int) -> dict[str, torch.Tensor]:
    """Tokens, which are also the labels."""
    device = next(model.parameters()).device
    tokens = torch.randint(0, model.config.vocab_size, (batch, length), device=device)  # type: ignore[union-attr]
    return {"input_ids": tokens, "labels": tokens}
