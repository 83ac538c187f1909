"""What the names in transformers' models say each weight is for: the truth that roles are measured against.

A name that says nothing definite (``dense`` alone, ``out_proj`` of a state-space mixer) is left out.
"""

from __future__ import annotations

import re

_SILENT = r"mixer|mamba|rwkv|recurrent|temporal_block|\.attention\.(receptance|output)\.weight$|conv\.(in|out)_proj"
_ATTENTION = r"(attn|[aA]ttention\w*|self|att)\."

#: Patterns over the qualified name by role; the first role of which one is found counts.
_PATTERNS: dict[str, tuple[str, ...]] = {
    "router": (
        r"shared_expert_gate\.weight$",
        r"(block_sparse_moe|mlp|moe|feed_forward)\.(gate|router)(\.\w+)?\.weight$",
        r"router(\.\w+)*\.weight$",
    ),
    "expert.gate_up": (r"experts?\.gate_up_proj$", r"input_linear\.weight$"),
    "expert.down": (r"experts?\.down_proj$", r"output_linear\.weight$"),
    "head": (
        r"(lm_head|classifier|qa_outputs|score|embed_out|pre_classifier|pooler|proj_out)\b(\.\w+)*\.weight$",
        r"(text|visual)_projection\.weight$",
        r"(predictions|vocab_transform|vocab_projector)\b(\.\w+)*\.weight$",
    ),
    "patch_embedding": (r"patch_embed\w*\.(proj|projection)\.weight$", r"patch_embedding\.weight$"),
    "embedding": (
        r"(cls_token|pos_embed\w*|position_embeddings?|class_embedding|mask_token|distillation_token)$",
        r"(word|token_type|positions?|[xyhw]_position|token|pos)_?embeddings?\.weight$",
        r"(embed_tokens|embed_in|wte|wpe|tokens_embed|positions_embed|shared|embed_positions)\.weight$",
        r"(relative_attention_bias|lang_embeddings)\.weight$",
    ),
    "attention.qkv": (r"(query_key_value|qkv_proj|qkv|c_attn|Wqkv)\.weight$", r"in_proj_weight$"),
    "attention.kv": (r"kv_b_proj\.weight$", r"kv_a_proj_with_mqa\.weight$"),
    "attention.query": (r"(q_[ab]_proj|q_proj|q_lin|query|query_proj)\.weight$", _ATTENTION + r"q\.weight$"),
    "attention.key": (r"(k_proj|k_lin|key|key_proj)\.weight$", _ATTENTION + r"k\.weight$"),
    "attention.value": (r"(v_proj|v_lin|value|value_proj)\.weight$", _ATTENTION + r"v\.weight$"),
    "attention.output": (
        r"(o_proj|out_lin)\.weight$",
        _ATTENTION + r"(o|c_proj|out_proj|dense|Wo|output\.dense|proj|projection)\.weight$",
    ),
    "feed_forward.gate_up": (r"gate_up_proj\.weight$", r"mlp\.Wi\.weight$"),
    "feed_forward.gate": (r"(gate_proj|wi_0|\.w1)\.weight$",),
    "feed_forward.up": (
        r"(up_proj|wi_1|\.w3)\.weight$",
        r"(mlp\.c_fc|mlp\.fc_in|dense_h_to_4h|intermediate\.dense|ffn\.lin1|fc1|[^m]\.wi|mlp\.wi)\.weight$",
    ),
    "feed_forward.down": (
        r"(down_proj|\.wo|\.w2|mlp\.Wo)\.weight$",
        r"(mlp\.c_proj|mlp\.fc_out|dense_4h_to_h|output\.dense|ffn\.lin2|fc2)\.weight$",
    ),
}


def find_named_role(name: str) -> str | None:
    """The role that the name of a weight gives it, or ``None`` if it does not say."""
    if re.search(_SILENT, name):
        return None
    found = (role for role, patterns in _PATTERNS.items() if any(re.search(pattern, name) for pattern in patterns))
    return next(found, None)
