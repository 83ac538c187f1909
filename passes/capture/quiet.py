"""Silence the loggers of other libraries where their messages are expected, and the lock for such global changes."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

#: Lock for temporary changes of global state: levels of loggers, methods of torch's classes.
PROCESS_LOCK = threading.RLock()


@contextlib.contextmanager
def quiet_loggers(*names: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Inside, these loggers (``""`` is the root) log nothing below ``level``."""
    loggers = [logging.getLogger(name) for name in names]
    with PROCESS_LOCK:
        before = [each.level for each in loggers]
        try:
            for each in loggers:
                each.setLevel(level)
            yield
        finally:
            for each, old in zip(loggers, before, strict=True):
                each.setLevel(old)
