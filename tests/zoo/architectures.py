"""The architectures of transformers in the zoo, all families together."""

from __future__ import annotations

from tests.zoo.architectures_decoders import DECODERS, RECURRENT, ROUTED_DECODERS
from tests.zoo.architectures_encoder_decoders import ENCODER_DECODERS
from tests.zoo.architectures_encoders import ENCODERS
from tests.zoo.architectures_multimodal import MULTIMODAL
from tests.zoo.architectures_signals import AUDIO, TIME_SERIES
from tests.zoo.architectures_vision import VISION

ARCHITECTURES = (
    *ENCODERS,
    *DECODERS,
    *ENCODER_DECODERS,
    *ROUTED_DECODERS,
    *RECURRENT,
    *VISION,
    *AUDIO,
    *MULTIMODAL,
    *TIME_SERIES,
)
