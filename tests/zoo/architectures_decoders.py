"""Text decoders: dense, routed to experts, and recurrent ones; language modeling throughout."""

from __future__ import annotations

import functools

from tests.zoo.build import describe_architecture
from tests.zoo.inputs import VOCABULARY, leave_out, text_to_continue, text_to_text, text_with_class
from tests.zoo.shapes import CAUSAL, GPT, GROUPED, HEADS, ROUTED, SPECIAL, T5

XLNET = {"vocab_size": VOCABULARY, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48, "use_mems_eval": False}
MPT = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64, "expansion_ratio": 2}
SCALED = {"embedding_multiplier": 2.0, "logits_scaling": 2.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3}
SHARED_EXPERT = {"shared_expert_intermediate_size": 24, "decoder_sparse_step": 1}
LATENT = {"n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
LATENT |= {"first_k_dense_replace": 1, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 4}
LATENT |= {"qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
MAMBA = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 4,
    "vocab_size": VOCABULARY,
    "use_cache": False,
} | SPECIAL
MAMBA2 = MAMBA | {"num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 4}
RWKV = {"hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "vocab_size": VOCABULARY}
RWKV |= {"context_length": 64, "use_cache": False}
HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
HYBRID |= {"num_experts": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False}
BAMBA = {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_chunk_size": 4}
WINDOWED = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}

decoder = functools.partial(describe_architecture, "decoder")
routed = functools.partial(describe_architecture, "moe")
recurrent = functools.partial(describe_architecture, "state-space")

DECODERS = (
    decoder("gpt2", "GPT2LMHeadModel", text_to_continue, GPT | SPECIAL, traits=["tied"]),
    decoder(
        "gpt2-cached",
        "GPT2LMHeadModel",
        text_to_continue,
        GPT | SPECIAL | {"use_cache": True},
        traits=["tied", "cache"],
    ),
    decoder(
        "gpt-neo",
        "GPTNeoForCausalLM",
        text_to_continue,
        {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]}
        | {"window_size": 4, "intermediate_size": 48, "vocab_size": VOCABULARY, "max_position_embeddings": 64}
        | {"use_cache": False, "resid_dropout": 0.1}
        | SPECIAL,
        traits=["tied"],
    ),
    decoder(
        "gpt-neox", "GPTNeoXForCausalLM", text_to_continue, CAUSAL | {"hidden_dropout": 0.1}, traits=["packed-qkv"]
    ),
    decoder("gptj", "GPTJForCausalLM", text_to_continue, GPT | SPECIAL | {"rotary_dim": 4, "resid_pdrop": 0.1}),
    decoder("gpt-bigcode", "GPTBigCodeForCausalLM", text_to_continue, GPT | SPECIAL, traits=["tied", "packed-qkv"]),
    decoder("openai-gpt", "OpenAIGPTLMHeadModel", text_to_continue, GPT | SPECIAL, traits=["tied", "packed-qkv"]),
    decoder(
        "opt",
        "OPTForCausalLM",
        text_to_continue,
        CAUSAL | {"ffn_dim": 48, "word_embed_proj_dim": 16},
        traits=["tied"],
    ),
    decoder(
        "bloom",
        "BloomForCausalLM",
        text_to_continue,
        {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY, "use_cache": False}
        | {"hidden_dropout": 0.1}
        | SPECIAL,
        traits=["tied", "packed-qkv"],
    ),
    decoder("llama", "LlamaForCausalLM", text_to_continue, GROUPED),
    decoder(
        "llama-classifier",
        "LlamaForSequenceClassification",
        text_with_class,
        GROUPED | {"use_cache": True},
        traits=["cache"],
    ),
    decoder("mistral", "MistralForCausalLM", text_to_continue, GROUPED | {"sliding_window": 6}),
    decoder("qwen2", "Qwen2ForCausalLM", text_to_continue, GROUPED | {"attention_dropout": 0.1}),
    decoder("qwen3", "Qwen3ForCausalLM", text_to_continue, HEADS),
    decoder("gemma", "GemmaForCausalLM", text_to_continue, HEADS, traits=["tied"]),
    decoder(
        "gemma2",
        "Gemma2ForCausalLM",
        text_to_continue,
        HEADS | WINDOWED | {"query_pre_attn_scalar": 8},
        traits=["tied"],
    ),
    decoder(
        "gemma3",
        "Gemma3ForCausalLM",
        text_to_continue,
        HEADS | WINDOWED | {"query_pre_attn_scalar": 8},
        traits=["tied"],
    ),
    decoder("phi", "PhiForCausalLM", text_to_continue, GROUPED | {"resid_pdrop": 0.1, "embd_pdrop": 0.1}),
    decoder("phi3", "Phi3ForCausalLM", text_to_continue, GROUPED | {"resid_pdrop": 0.1}, traits=["packed-qkv"]),
    decoder("falcon", "FalconForCausalLM", text_to_continue, CAUSAL, traits=["tied", "packed-qkv"]),
    decoder(
        "falcon-alibi",
        "FalconForCausalLM",
        text_to_continue,
        CAUSAL | {"alibi": True, "multi_query": False, "new_decoder_architecture": False, "hidden_dropout": 0.1},
        traits=["tied", "packed-qkv"],
    ),
    decoder("stablelm", "StableLmForCausalLM", text_to_continue, GROUPED | {"hidden_dropout": 0.1}),
    decoder(
        "starcoder2", "Starcoder2ForCausalLM", text_to_continue, GROUPED | {"residual_dropout": 0.1}, traits=["tied"]
    ),
    decoder("olmo", "OlmoForCausalLM", text_to_continue, GROUPED | {"clip_qkv": 4.0}),
    decoder("olmo2", "Olmo2ForCausalLM", text_to_continue, GROUPED),
    decoder("cohere", "CohereForCausalLM", text_to_continue, GROUPED | {"use_qk_norm": True}, traits=["tied"]),
    decoder("granite", "GraniteForCausalLM", text_to_continue, GROUPED | SCALED),
    decoder("glm", "GlmForCausalLM", text_to_continue, HEADS, traits=["packed-gate-up"]),
    decoder(
        "smollm3", "SmolLM3ForCausalLM", text_to_continue, GROUPED | {"no_rope_layer_interval": 2}, traits=["tied"]
    ),
    decoder("xlnet", "XLNetForSequenceClassification", text_with_class, XLNET, traits=["einsum"]),
    decoder("ctrl", "CTRLLMHeadModel", text_to_continue, GPT | {"dff": 48}, traits=["tied"]),
    decoder("biogpt", "BioGptForCausalLM", text_to_continue, CAUSAL, traits=["tied"]),
    decoder(
        "codegen",
        "CodeGenForCausalLM",
        text_to_continue,
        GPT | SPECIAL | {"rotary_dim": 4, "resid_pdrop": 0.1},
        traits=["packed-qkv"],
    ),
    decoder("mpt", "MptForCausalLM", text_to_continue, MPT, traits=["tied", "packed-qkv"]),
)
ROUTED_DECODERS = (
    routed("mixtral", "MixtralForCausalLM", text_to_continue, GROUPED | LOCAL_EXPERTS, traits=["experts"]),
    routed("qwen2-moe", "Qwen2MoeForCausalLM", text_to_continue, ROUTED | SHARED_EXPERT, traits=["experts"]),
    routed("qwen3-moe", "Qwen3MoeForCausalLM", text_to_continue, ROUTED | {"head_dim": 8}, traits=["experts"]),
    routed("olmoe", "OlmoeForCausalLM", text_to_continue, ROUTED, traits=["experts"]),
    routed("gpt-oss", "GptOssForCausalLM", text_to_continue, HEADS | LOCAL_EXPERTS | WINDOWED, traits=["experts"]),
    routed("deepseek-v3", "DeepseekV3ForCausalLM", text_to_continue, CAUSAL | LATENT, traits=["experts"]),
    routed("granitemoe", "GraniteMoeForCausalLM", text_to_continue, GROUPED | LOCAL_EXPERTS, traits=["experts"]),
    routed("phimoe", "PhimoeForCausalLM", text_to_continue, GROUPED | LOCAL_EXPERTS, traits=["experts"]),
    routed(
        "switch",
        "SwitchTransformersForConditionalGeneration",
        text_to_text,
        T5 | {"num_experts": 4, "expert_capacity": 16, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        traits=["experts", "tied"],
    ),
)
RECURRENT = (
    recurrent("mamba", "MambaForCausalLM", text_to_continue, MAMBA, traits=["tied"]),
    recurrent("mamba2", "Mamba2ForCausalLM", text_to_continue, MAMBA2),
    recurrent("falcon-mamba", "FalconMambaForCausalLM", text_to_continue, MAMBA, traits=["tied"]),
    recurrent("rwkv", "RwkvForCausalLM", leave_out(text_to_continue, "attention_mask"), RWKV, traits=["python-loop"]),
    recurrent(
        "recurrent-gemma",
        "RecurrentGemmaForCausalLM",
        text_to_continue,
        CAUSAL | {"lru_width": 32, "block_types": ["recurrent", "attention"], "attention_window_size": 32},
        traits=["tied", "custom-autograd"],
    ),
    recurrent("jamba", "JambaForCausalLM", text_to_continue, GROUPED | HYBRID, traits=["experts"]),
    recurrent("bamba", "BambaForCausalLM", text_to_continue, GROUPED | BAMBA),
    recurrent(
        "lfm2",
        "Lfm2ForCausalLM",
        text_to_continue,
        GROUPED | {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        traits=["tied"],
    ),
)
