"""Small sizes under the names that families of configurations give them."""

from __future__ import annotations

from tests.zoo.inputs import VOCABULARY

LAYERS = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = LAYERS | {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
IMAGE = LAYERS | {"image_size": 32, "patch_size": 8}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CAUSAL = TEXT | SPECIAL | {"use_cache": False}
GROUPED = CAUSAL | {"num_key_value_heads": 2}
HEADS = GROUPED | {"head_dim": 8}
ROUTED = GROUPED | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY, "use_cache": False}
SEQ2SEQ = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}
BART = SEQ2SEQ | SPECIAL | {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "use_cache": False}
BART |= {"decoder_start_token_id": 2}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "vocab_size": VOCABULARY}
T5 |= {"decoder_start_token_id": 0, "use_cache": False}
