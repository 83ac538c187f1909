"""Silence for loggers of other libraries, where what they say is wanted by nobody."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

#: Held by whoever changes something of the whole process for a while: levels of loggers, methods of torch's classes.
PROCESS_LOCK = threading.RLock()

#: Logs each error of an operator, also those that a model catches, and those that end up in a reason.
FAKE_TENSOR_LOGGER = "torch._subclasses.fake_tensor"


@contextlib.contextmanager
def quiet_loggers(*names: str, level: int = logging.CRITICAL) -> Iterator[None]:
    """Inside, these loggers (``""`` is the root) say nothing below ``level``."""
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
