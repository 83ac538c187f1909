"""Encoder-decoders for text, trained to generate one text from another."""

from __future__ import annotations

import functools

from tests.zoo.build import Config, describe_architecture
from tests.zoo.inputs import VOCABULARY, text_to_given_text, text_to_text
from tests.zoo.shapes import BART, SEQ2SEQ, SPECIAL, T5

PROPHETNET = {"hidden_size": 32, "num_encoder_layers": 2, "num_decoder_layers": 2, "num_encoder_attention_heads": 4}
PROPHETNET |= {"num_decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "use_cache": False}
PROPHETNET |= {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
LED = SEQ2SEQ | {"vocab_size": VOCABULARY, "attention_window": 4, "use_cache": False}
LED |= {"max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
FSMT: Config = SEQ2SEQ | SPECIAL | {"src_vocab_size": VOCABULARY, "tgt_vocab_size": VOCABULARY, "use_cache": False}
FSMT |= {"max_position_embeddings": 64, "langs": ["en", "de"]}

encoder_decoder = functools.partial(describe_architecture, "encoder-decoder")

ENCODER_DECODERS = (
    encoder_decoder("t5", "T5ForConditionalGeneration", text_to_text, T5, traits=["tied"]),
    encoder_decoder(
        "t5-cached", "T5ForConditionalGeneration", text_to_text, T5 | {"use_cache": True}, traits=["tied", "cache"]
    ),
    encoder_decoder("umt5", "UMT5ForConditionalGeneration", text_to_text, T5),
    encoder_decoder(
        "longt5", "LongT5ForConditionalGeneration", text_to_text, T5 | {"local_radius": 3}, traits=["tied"]
    ),
    encoder_decoder("bart", "BartForConditionalGeneration", text_to_text, BART, traits=["tied"]),
    encoder_decoder("mbart", "MBartForConditionalGeneration", text_to_text, BART, traits=["tied"]),
    encoder_decoder("pegasus", "PegasusForConditionalGeneration", text_to_text, BART, traits=["tied"]),
    encoder_decoder("marian", "MarianMTModel", text_to_text, BART, traits=["tied"]),
    encoder_decoder("led", "LEDForConditionalGeneration", text_to_text, LED, traits=["tied"]),
    encoder_decoder("blenderbot-small", "BlenderbotSmallForConditionalGeneration", text_to_text, BART, traits=["tied"]),
    encoder_decoder("prophetnet", "ProphetNetForConditionalGeneration", text_to_text, PROPHETNET, traits=["tied"]),
    encoder_decoder("m2m-100", "M2M100ForConditionalGeneration", text_to_text, BART, traits=["tied", "layer-drop"]),
    encoder_decoder("fsmt", "FSMTForConditionalGeneration", text_to_given_text, FSMT),
)
