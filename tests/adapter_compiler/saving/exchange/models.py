"""A small Llama with adapters of each kind, and a base folder for those readers that need one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import adapter_compiler as ac

#: Options of the adapters by the name of the case. Ranks differ between weights in "mixed ranks".
KINDS: dict[str, dict[str, Any]] = {
    "lora": {"kind": "lora"},
    "rslora": {"kind": "lora", "scaling": "rslora"},
    "svd": {"kind": "svd"},
    "mixed ranks": {"kind": "svd"},
    "dora": {"kind": "dora"},
    "trained head": {"kind": "svd", "trainable": ("lm_head.*",), "exclude": ("lm_head.*",)},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A model, its adapters in a folder, and what the two give together."""

    base: LlamaForCausalLM
    adapted: ac.AdaptedModel
    folder: Path
    base_folder: Path
    tokens: torch.Tensor

    def expected(self) -> torch.Tensor:
        """The logits of the adapted model."""
        with torch.no_grad():
            logits: torch.Tensor = self.adapted(self.tokens).logits
        return logits


def make_llama() -> LlamaForCausalLM:
    """Two blocks with four heads of queries and two of keys; nothing is tied."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        use_cache=False,
        bos_token_id=1,
        eos_token_id=2,
    )
    model: LlamaForCausalLM = LlamaForCausalLM(config).eval()
    return model


def make_case(kind: str, folder: Path, **options: Any) -> Case:
    """Adapt a Llama, change every parameter, and save the adapters and the base.

    Args:
        kind: one of :data:`KINDS`.
        folder: where to save.
        options: more options of ``AdapterConfig``.
    """
    base = make_llama()
    tokens = torch.randint(0, 64, (2, 9))
    chosen = {"rank": 4, "alpha": 6, "exclude": ("lm_head.*", "*embed_tokens*"), **KINDS[kind], **options}
    adapted = ac.compile_with_adapters(base, (tokens,), config=ac.AdapterConfig(**chosen))
    perturb(adapted, prune=kind == "mixed ranks")
    adapted.save(folder / "adapters")
    base.save_pretrained(folder / "base")
    case = Case(
        base=base, adapted=adapted.eval(), folder=folder / "adapters", base_folder=folder / "base", tokens=tokens
    )
    assert (case.expected() - base(tokens).logits).abs().max() > 0.05
    return case


def perturb(adapted: ac.AdaptedModel, *, prune: bool) -> None:
    """In place of training: other values, and other live ranks at each weight."""
    with torch.no_grad():
        for parameter in adapted.trainable_parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
        for number, adapter in enumerate(adapted.plan if prune else ()):
            adapted.adapters.parameters_of(adapter)["lam"][1 + number % 4 :] = 0


def add_updates(model: nn.Module, updates: dict[str, torch.Tensor]) -> nn.Module:
    """Add ΔW to weights, in place; each must be there and have this shape."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, delta in updates.items():
            assert parameters[name].shape == delta.shape, name
            parameters[name].add_(delta.to(parameters[name].dtype))
    return model
