"""Whether autocast is on where a tensor is, for devices that have none as well (``meta``)."""

from __future__ import annotations

import contextlib
from typing import Any

import torch


def is_autocast(tensor: torch.Tensor) -> bool:
    """Whether autocast is on for the device of a tensor; torch's own question is an error for ``meta``."""
    return not tensor.is_meta and torch.is_autocast_enabled(tensor.device.type)


def without_autocast(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    """A context without autocast; where autocast is off, a null context, because entering autocast takes time."""
    is_on = is_autocast(tensor)
    return torch.autocast(tensor.device.type, enabled=False) if is_on else contextlib.nullcontext()
