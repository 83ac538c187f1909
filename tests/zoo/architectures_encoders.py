"""Text encoders with the heads that one fine-tunes: classification, tagging, answers, masked tokens."""

from __future__ import annotations

import functools

from tests.zoo.build import describe_architecture
from tests.zoo.inputs import (
    boxed_text_with_class,
    bytes_with_class,
    leave_out,
    text_to_continue,
    text_with_class,
    text_with_classes,
    text_with_span,
)
from tests.zoo.shapes import LAYERS, TEXT

DISENTANGLED = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "type_vocab_size": 0}
DEBERTA_V2 = DISENTANGLED | {"position_buckets": 8, "norm_rel_ebd": "layer_norm", "share_att_key": True}
XLM = {"emb_dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 64, "max_position_embeddings": 64}
FUNNEL = {"vocab_size": 64, "block_sizes": [1, 2], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48}
BIG_BIRD = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
CANINE = {"local_transformer_stride": 8, "num_hash_buckets": 32, "max_position_embeddings": 64}
MOBILE = {"embedding_size": 16, "intra_bottleneck_size": 16, "num_feedforward_networks": 2, "intermediate_size": 16}
PERCEIVER = {"num_latents": 4, "d_latents": 16, "d_model": 32, "num_self_attends_per_block": 2}
PERCEIVER |= {"num_self_attention_heads": 2, "num_cross_attention_heads": 2, "vocab_size": 64}
PERCEIVER |= {"max_position_embeddings": 64}
REFORMER = {"attention_head_size": 8, "attn_layers": ["local", "lsh"], "feed_forward_size": 48, "hidden_size": 32}
REFORMER |= {"num_attention_heads": 4, "vocab_size": 64, "num_buckets": 2, "axial_pos_shape": (4, 4)}
REFORMER |= {"axial_pos_embds_dim": (8, 24), "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4}
# It reseeds the global generator from the clock in training, so that dropout would defy any seed.
REFORMER |= {"max_position_embeddings": 64, "hash_seed": 0}
REFORMER |= {"hidden_dropout_prob": 0.0, "local_attention_probs_dropout_prob": 0.0}

encoder = functools.partial(describe_architecture, "encoder")

ENCODERS = (
    encoder("bert", "BertForSequenceClassification", text_with_class, TEXT),
    encoder("roberta", "RobertaForSequenceClassification", text_with_class, TEXT),
    encoder(
        "distilbert",
        "DistilBertForSequenceClassification",
        text_with_class,
        {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "vocab_size": 64, "max_position_embeddings": 64},
    ),
    encoder(
        "albert",
        "AlbertForSequenceClassification",
        text_with_class,
        TEXT | {"embedding_size": 16, "classifier_dropout_prob": 0.1},
        traits=["shared-layers"],
    ),
    encoder("electra", "ElectraForSequenceClassification", text_with_class, TEXT | {"embedding_size": 16}),
    encoder("deberta", "DebertaForSequenceClassification", text_with_class, TEXT | DISENTANGLED),
    encoder("deberta-v2", "DebertaV2ForSequenceClassification", text_with_class, TEXT | DEBERTA_V2),
    encoder("mpnet", "MPNetForSequenceClassification", text_with_class, TEXT),
    encoder("xlm-roberta", "XLMRobertaForTokenClassification", text_with_classes, TEXT),
    encoder(
        "modernbert",
        "ModernBertForSequenceClassification",
        text_with_class,
        TEXT
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
        | {"attention_dropout": 0.1, "mlp_dropout": 0.1, "local_attention": 4},
    ),
    encoder(
        "fnet", "FNetForSequenceClassification", leave_out(text_with_class, "attention_mask"), TEXT, traits=["complex"]
    ),
    encoder("funnel", "FunnelForSequenceClassification", text_with_class, FUNNEL),
    encoder("roformer", "RoFormerForSequenceClassification", text_with_class, TEXT | {"embedding_size": 16}),
    encoder(
        "convbert",
        "ConvBertForSequenceClassification",
        text_with_class,
        TEXT | {"embedding_size": 16, "conv_kernel_size": 3},
    ),
    encoder(
        "squeezebert",
        "SqueezeBertForSequenceClassification",
        text_with_class,
        TEXT | {"embedding_size": 32},
    ),
    encoder("longformer", "LongformerForSequenceClassification", text_with_class, TEXT | {"attention_window": 4}),
    encoder(
        "bigbird",
        "BigBirdForSequenceClassification",
        text_with_class,
        TEXT | BIG_BIRD,
        size=(2, 16),
        other_size=(3, 24),
        traits=["numpy-rng"],
    ),
    encoder(
        "nystromformer",
        "NystromformerForSequenceClassification",
        text_with_class,
        TEXT | {"segment_means_seq_len": 8, "num_landmarks": 8, "conv_kernel_size": 3},
    ),
    encoder("yoso", "YosoForSequenceClassification", text_with_class, TEXT),
    encoder(
        "canine", "CanineForSequenceClassification", text_with_class, LAYERS | CANINE, size=(2, 16), other_size=(3, 32)
    ),
    encoder("layoutlm", "LayoutLMForSequenceClassification", boxed_text_with_class, TEXT),
    encoder(
        "lilt",
        "LiltForSequenceClassification",
        boxed_text_with_class,
        TEXT | {"hidden_size": 48, "channel_shrink_ratio": 2},
    ),
    encoder("ernie", "ErnieForQuestionAnswering", text_with_span, TEXT),
    encoder(
        "esm",
        "EsmForMaskedLM",
        text_to_continue,
        TEXT | {"position_embedding_type": "rotary", "pad_token_id": 1, "mask_token_id": 2, "token_dropout": True},
        traits=["tied"],
    ),
    encoder("mobilebert", "MobileBertForSequenceClassification", text_with_class, TEXT | MOBILE),
    encoder("ibert", "IBertForSequenceClassification", text_with_class, TEXT),
    encoder("perceiver", "PerceiverForSequenceClassification", bytes_with_class, PERCEIVER),
    encoder(
        "rembert",
        "RemBertForSequenceClassification",
        text_with_class,
        TEXT | {"input_embedding_size": 16, "output_embedding_size": 40, "hidden_dropout_prob": 0.1},
    ),
    encoder("megatron-bert", "MegatronBertForMaskedLM", text_to_continue, TEXT, traits=["tied"]),
    encoder("xlm", "XLMForSequenceClassification", text_with_class, XLM),
    encoder(
        "reformer",
        "ReformerForSequenceClassification",
        text_with_class,
        REFORMER,
        traits=["custom-autograd", "data-dependent", "no-eval-backward"],
        size=(2, 16),
        other_size=(3, 16),
    ),
)
