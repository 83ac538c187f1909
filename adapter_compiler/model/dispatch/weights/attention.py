"""Multi-head attention of ``torch.nn.functional`` with adapted weights, whose adapters run on activations.

``F.multi_head_attention_forward`` first checks whether an argument overrides torch functions, and if so passes the
whole call to ``__torch_function__``. Its own Python code works with adapted weights, so it is run without this check.
"""

from __future__ import annotations

import types
from typing import Any

import torch.nn.functional as F


def _never(arguments: Any) -> bool:
    return False


def _without_override_check(function: Any) -> Any:
    """A function of the same code for which ``has_torch_function`` returns false; the original does not change."""
    globals_ = {**function.__globals__, "has_torch_function": _never}
    made = types.FunctionType(
        function.__code__, globals_, function.__name__, function.__defaults__, function.__closure__
    )
    made.__kwdefaults__ = function.__kwdefaults__
    return made


_RUN = _without_override_check(F.multi_head_attention_forward)


def run_attention(*args: Any, **kwargs: Any) -> Any:
    """``F.multi_head_attention_forward``, with the same arguments and result."""
    return _RUN(*args, **kwargs)
