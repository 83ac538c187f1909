"""Silence for loggers of other libraries, where what they say is wanted by nobody."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_loggers(*names: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Inside, these loggers (``""`` is the root) say nothing below ``level``."""
    loggers = [logging.getLogger(name) for name in names]
    before = [each.level for each in loggers]
    try:
        for each in loggers:
            each.setLevel(level)
        yield
    finally:
        for each, old in zip(loggers, before, strict=True):
            each.setLevel(old)
