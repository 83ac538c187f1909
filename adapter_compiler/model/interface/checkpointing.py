"""Gradient checkpointing that transformers' models offer, made to reach the adapters."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

#: The method under its present and its former name.
_METHODS = frozenset({"activation_checkpointing_enable", "gradient_checkpointing_enable"})


def adjust_method(module: nn.Module, name: str, value: Any) -> Any:
    """The attribute ``value`` of a module; if it switches checkpoints on, it also makes inputs of blocks require grad.

    A reentrant checkpoint gives no gradients to anything in it unless an input requires grad, and with frozen
    embeddings none does. PEFT does the same.

    Args:
        module: the user's module.
        name: the attribute's name.
        value: its value.
    """
    if name not in _METHODS or not hasattr(module, "enable_input_require_grads"):
        return value

    @functools.wraps(value)
    def enable(*args: Any, **kwargs: Any) -> Any:
        result = value(*args, **kwargs)
        if not getattr(module, "_require_grads_hook", None):
            module.enable_input_require_grads()  # type: ignore[operator]
        return result

    return enable
