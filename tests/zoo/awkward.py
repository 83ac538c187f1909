"""The awkward modules of the zoo, all kinds together."""

from __future__ import annotations

from tests.zoo.awkward_control import CONTROL
from tests.zoo.awkward_interfaces import INTERFACES
from tests.zoo.awkward_layers import LAYERS
from tests.zoo.awkward_models import MODELS
from tests.zoo.awkward_sequences import SEQUENCES
from tests.zoo.awkward_state import STATE
from tests.zoo.awkward_weights import WEIGHTS

AWKWARD = (*WEIGHTS, *LAYERS, *SEQUENCES, *CONTROL, *INTERFACES, *STATE, *MODELS)
