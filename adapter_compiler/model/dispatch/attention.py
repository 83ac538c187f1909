"""Multi-head attention of torch.nn.functional on adapted weights, each of which then runs on activations.

``F.multi_head_attention_forward`` asks at its beginning whether an argument overrides torch functions, and if so hands
all of itself over. Its own Python does the right thing with such arguments: it is run without asking.
"""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F


def _never(arguments: Any) -> bool:
    return False


def _without_asking(function: Any) -> Any:
    """The same code where ``has_torch_function`` says no; the function itself stays as it is."""
    globals_ = {**function.__globals__, "has_torch_function": _never}
    made = types.FunctionType(
        function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_RUN = _without_asking(F.multi_head_attention_forward)


def run_attention(*args: Any, **kwargs: Any) -> Any:
    """What ``F.multi_head_attention_forward`` returns."""
    return _RUN(*args, **kwargs)
