"""Names and layouts of a model's weights in llama.cpp, as its converter writes them.

The names are those of the package ``gguf`` (``TensorNameMap``). The layouts are in the converter's classes
(``conversion/*.py``): LLaMA and Mistral have the rows of the query and key projections in another order, because
llama.cpp rotates neighboring rows where transformers rotates halves; GPT-2's are transposed. For architectures whose
converter has not been read for this table, an adapter is refused.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.base_config import BaseConfig

#: Class in transformers → name in ``gguf.MODEL_ARCH``, and whether rows of queries and keys are permuted.
ARCHITECTURES: dict[str, tuple[str, bool]] = {
    "Gemma2ForCausalLM": ("GEMMA2", False),
    "Gemma3ForCausalLM": ("GEMMA3", False),
    "GemmaForCausalLM": ("GEMMA", False),
    "GPT2LMHeadModel": ("GPT2", False),
    "LlamaForCausalLM": ("LLAMA", True),
    "MistralForCausalLM": ("LLAMA", True),
    "Phi3ForCausalLM": ("PHI3", False),
    "PhiForCausalLM": ("PHI2", False),
    "Qwen2ForCausalLM": ("QWEN2", False),
    "Qwen3ForCausalLM": ("QWEN3", False),
    "Starcoder2ForCausalLM": ("STARCODER2", False),
}

#: The tensors of a block that llama.cpp's graphs add adapters to, and the embedding and the head.
_IN_BLOCKS = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
_EMBEDDING, _HEAD = "token_embd", "output"

_FOLD = "fold the adapters into the base with fold_files and convert the model"


@dataclasses.dataclass(frozen=True, kw_only=True)
class GgufNames:
    """The weights of one base model in llama.cpp.

    Attributes:
        base: its configuration.
        architecture: llama.cpp's name of the architecture.
        names: the package's map of names.
        is_permuted: whether the rows of queries and keys are in llama.cpp's order.
    """

    base: BaseConfig
    architecture: str
    names: Any
    is_permuted: bool

    @classmethod
    def find(cls, gguf: Any, base: BaseConfig) -> GgufNames:
        """The names for a base model.

        Raises:
            ConfigError: the architecture has no entry in the table.
        """
        if base.architecture not in ARCHITECTURES:
            raise ConfigError(
                f"{base.path}: how llama.cpp lays out the weights of {base.architecture or 'no architecture'!r} is not "
                f"known here; expected one of {', '.join(ARCHITECTURES)}; {_FOLD}"
            )
        name, is_permuted = ARCHITECTURES[base.architecture]
        kind = getattr(gguf.MODEL_ARCH, name)
        names = gguf.get_tensor_name_map(kind, base.layers)
        architecture = str(gguf.MODEL_ARCH_NAMES[kind])
        return cls(base=base, architecture=architecture, names=names, is_permuted=is_permuted)

    def name_of(self, weight: str) -> str:
        """llama.cpp's name of a weight.

        Raises:
            ConfigError: llama.cpp has none, or adds no adapters to it.
        """
        name = self.names.get_name(weight, try_suffixes=(".weight",))
        role = str(name or "").removesuffix(".weight").rpartition(".")[2]
        if name is None or role not in (*_IN_BLOCKS, _EMBEDDING, _HEAD):
            raise ConfigError(
                f"{weight}: llama.cpp adds no adapters to this weight of {self.base.architecture}; expected "
                f"projections of attention and of the feed-forward part, the embedding of tokens or the head; {_FOLD}"
            )
        if role == _HEAD and self.base.is_tied:
            raise ConfigError(
                f"{weight} is tied to the embedding in {self.base.path}, so llama.cpp has no head; {_FOLD}"
            )
        return str(name)

    def assert_embedding_alone(self, weight: str) -> None:
        """Raise :class:`ConfigError` if llama.cpp has other rows in the embedding, or also uses it as the head."""
        if self.base.is_tied or self.base.architecture == "Gemma3ForCausalLM":
            raise ConfigError(
                f"{weight} is an embedding that the head is tied to in {self.base.path}: llama.cpp would adapt the "
                f"head as well, in another layout; {_FOLD}"
            )

    def permute_rows(self, weight: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows in transformers' order → in llama.cpp's, where the two differ."""
        heads = self._count_permuted_heads(weight)
        return rows if heads == 0 else _swap(rows, heads, 2, len(rows) // heads // 2)

    def restore_rows(self, weight: str, rows: torch.Tensor) -> torch.Tensor:
        """Rows in llama.cpp's order → in transformers'."""
        heads = self._count_permuted_heads(weight)
        return rows if heads == 0 else _swap(rows, heads, len(rows) // heads // 2, 2)

    def _count_permuted_heads(self, weight: str) -> int:
        if not self.is_permuted:
            return 0
        module = weight.removesuffix(".weight")
        return self.base.heads if module.endswith("q_proj") else self.base.key_heads if module.endswith("k_proj") else 0


def _swap(rows: torch.Tensor, *sizes: int) -> torch.Tensor:
    return rows.reshape(*sizes, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
