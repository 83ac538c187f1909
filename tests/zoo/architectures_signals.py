"""Audio and time series."""

from __future__ import annotations

import functools

from tests.zoo.build import Config, describe_architecture
from tests.zoo.inputs import (
    VOCABULARY,
    frames_to_text,
    patches_to_forecast,
    series_to_forecast,
    sound_to_text,
    sound_with_class,
    spectrogram_to_text,
    spectrogram_with_class,
)
from tests.zoo.shapes import LAYERS, SEQ2SEQ, SPECIAL

SOUND = LAYERS | {"conv_dim": [8, 8], "conv_kernel": [8, 4], "conv_stride": [4, 4], "num_conv_pos_embeddings": 4}
SOUND |= {"num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "apply_spec_augment": False}
SOUND |= {"vocab_size": VOCABULARY, "num_feat_extract_layers": 2}
WHISPER: Config = SEQ2SEQ | SPECIAL | {"vocab_size": VOCABULARY, "num_mel_bins": 16, "max_source_positions": 20}
WHISPER |= {"max_target_positions": 32, "dropout": 0.1, "decoder_start_token_id": 1, "use_cache": False}
SPEECH = SEQ2SEQ | SPECIAL | {"vocab_size": VOCABULARY, "input_feat_per_channel": 16, "conv_channels": 24}
SPEECH |= {"max_source_positions": 64, "max_target_positions": 64, "num_conv_layers": 2, "use_cache": False}
FORECAST = SEQ2SEQ | {"prediction_length": 4, "context_length": 16, "num_time_features": 2, "lags_sequence": [1, 2]}
FORECAST |= {"use_cache": False}
PATCHES = {"context_length": 32, "prediction_length": 8, "patch_length": 8, "patch_stride": 8}
PATCHES |= {"num_input_channels": 3}

audio = functools.partial(describe_architecture, "audio")
series = functools.partial(describe_architecture, "time-series")

AUDIO = (
    audio("whisper", "WhisperForConditionalGeneration", spectrogram_to_text, WHISPER, traits=["tied"]),
    audio("speech-to-text", "Speech2TextForConditionalGeneration", frames_to_text, SPEECH, traits=["tied"]),
    audio(
        "wav2vec2", "Wav2Vec2ForCTC", sound_to_text, SOUND, traits=["layer-drop", "parametrization", "data-dependent"]
    ),
    audio(
        "hubert",
        "HubertForSequenceClassification",
        sound_with_class,
        SOUND | {"apply_spec_augment": True, "mask_time_length": 2},
        traits=["layer-drop", "parametrization", "numpy-rng"],
    ),
    audio("wavlm", "WavLMForSequenceClassification", sound_with_class, SOUND, traits=["layer-drop", "parametrization"]),
    audio(
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForSequenceClassification",
        sound_with_class,
        SOUND | {"layerdrop": 0.0, "conv_depthwise_kernel_size": 3, "max_source_positions": 200},
        traits=["buffers"],
    ),
    audio(
        "sew",
        "SEWForSequenceClassification",
        sound_with_class,
        SOUND | {"squeeze_factor": 2, "layerdrop": 0.0},
        traits=["parametrization"],
    ),
    audio(
        "unispeech",
        "UniSpeechForSequenceClassification",
        sound_with_class,
        SOUND,
        traits=["layer-drop", "parametrization"],
    ),
    audio(
        "ast",
        "ASTForAudioClassification",
        spectrogram_with_class,
        LAYERS | {"patch_size": 8, "frequency_stride": 4, "time_stride": 4, "max_length": 24, "num_mel_bins": 16},
    ),
)
TIME_SERIES = (
    series(
        "time-series-transformer",
        "TimeSeriesTransformerForPrediction",
        series_to_forecast,
        FORECAST,
        traits=["layer-drop"],
    ),
    series("informer", "InformerForPrediction", series_to_forecast, FORECAST, traits=["layer-drop", "rng"]),
    series(
        "autoformer",
        "AutoformerForPrediction",
        series_to_forecast,
        FORECAST | {"label_length": 8, "moving_average": 5},
        traits=["layer-drop", "complex"],
    ),
    series(
        "patchtst",
        "PatchTSTForPrediction",
        patches_to_forecast,
        PATCHES | {"d_model": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 48, "ff_dropout": 0.1},
        traits=["buffers"],
    ),
    series(
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        patches_to_forecast,
        PATCHES | {"d_model": 32, "num_layers": 2, "mode": "mix_channel"},
    ),
)
