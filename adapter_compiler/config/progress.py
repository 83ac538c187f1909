"""Work that takes over two seconds says what it is doing: a bar in a terminal, log messages elsewhere, or nothing.

The caller opens ``with progress("folding"):``, and whatever runs inside says ``tell("blocks.3.up.weight", 4, 24)``.
Work inside other work speaks through the outer one, so that there is one bar.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import threading
import time
from collections.abc import Iterator
from threading import Timer
from typing import Any, Protocol

from adapter_compiler.errors import ConfigError

logger = logging.getLogger(__name__)

#: Seconds until the first word, and between two log messages.
DELAY, BETWEEN = 2.0, 10.0
MODES = ("auto", "logging", "off")

_chosen = {"mode": "auto"}
_present = threading.local()


def set_progress(mode: str) -> str:
    """Choose how long work is told of: compiling, starts from data, folding and export.

    Args:
        mode: ``"auto"``, a bar on standard error if that is a terminal and rich is installed, else log messages
            (level INFO of the logger ``adapter_compiler``); ``"logging"``, always log messages; or ``"off"``, nothing.

    Returns:
        The mode before, to set it back.

    Raises:
        ConfigError: there is no such mode.
    """
    if mode not in MODES:
        raise ConfigError(f"set_progress({mode!r}): expected one of {', '.join(map(repr, MODES))}")
    before, _chosen["mode"] = _chosen["mode"], mode
    return before


@contextlib.contextmanager
def progress(title: str) -> Iterator[None]:
    """A context for work that may take long; ``title`` says what it is."""
    outer: _Teller | _Mute | None = getattr(_present, "teller", None)
    if outer is not None:
        with outer.inside(title):
            yield
        return
    display = _choose_display(title)
    if display is None:
        yield
        return
    teller = _present.teller = _Teller(display)
    try:
        yield
        teller.end(succeeded=True)
    finally:
        _present.teller = None
        teller.end(succeeded=False)


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """A context for programs that show a bar of their own: in this thread, nothing inside is told."""
    before = getattr(_present, "teller", None)
    _present.teller = _Mute()
    try:
        yield
    finally:
        _present.teller = before


def tell(what: str, done: int = 0, total: int = 0) -> None:
    """Say what is being done now: the present item, the number of finished items, and that of all, if it is known."""
    teller: _Teller | _Mute | None = getattr(_present, "teller", None)
    if teller is not None:
        teller.tell(what, done, total)


class _Display(Protocol):
    def begin(self) -> None: ...
    def show(self, what: str, done: int, total: int) -> None: ...
    def end(self, seconds: float, *, succeeded: bool) -> None: ...


def _choose_display(title: str) -> _Display | None:
    mode = _chosen["mode"]
    if mode == "auto" and sys.stderr is not None and sys.stderr.isatty() and importlib.util.find_spec("rich"):
        return _Bar(title)
    return _Log(title) if mode != "off" and logger.isEnabledFor(logging.INFO) else None


class _Teller:
    """Waits for two seconds, in a thread, and then passes on what it is told."""

    def __init__(self, display: _Display) -> None:
        self._display = display
        self._lock = threading.Lock()
        self._titles: list[str] = []
        self._last: tuple[str, int, int] = ("", 0, 0)
        self._is_shown = self._has_ended = False
        self._start = time.perf_counter()
        self._timer = Timer(DELAY, self._begin)
        self._timer.daemon = True
        self._timer.start()

    def tell(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._last = (": ".join([*self._titles, what]), done, total)
            if self._is_shown:
                self._display.show(*self._last)

    @contextlib.contextmanager
    def inside(self, title: str) -> Iterator[None]:
        self._titles.append(title)
        try:
            yield
        finally:
            self._titles.pop()

    def end(self, *, succeeded: bool) -> None:
        self._timer.cancel()
        with self._lock:
            if self._is_shown and not self._has_ended:
                self._display.end(time.perf_counter() - self._start, succeeded=succeeded)
            self._has_ended = True

    def _begin(self) -> None:
        with self._lock:
            if not self._has_ended:
                self._display.begin()
                self._is_shown = True
                self._display.show(*self._last)


class _Mute:
    """Passes nothing on."""

    def tell(self, what: str, done: int, total: int) -> None:
        """Nothing is said."""

    def inside(self, title: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


class _Log:
    """One message at the beginning, one now and then, one at the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._next = 0.0

    def begin(self) -> None:
        """The first message is the first that is shown."""

    def show(self, what: str, done: int, total: int) -> None:
        if time.perf_counter() >= self._next:
            self._next = time.perf_counter() + BETWEEN
            count = f" ({done} of {total})" if total else ""
            logger.info("%s: %s%s", self._title, what or "has begun", count)

    def end(self, seconds: float, *, succeeded: bool) -> None:
        logger.info("%s: %s after %.1f s", self._title, "done" if succeeded else "failed", seconds)


class _Bar:
    """A bar of rich on standard error, which is gone at the end."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._bar: Any = None

    def begin(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        title, what = (TextColumn(text, markup=False) for text in ("{task.description}", "{task.fields[what]}"))
        # A thread begins this, so the process's streams are left as they are: the caller may redirect them meanwhile.
        self._bar = Progress(
            *(title, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), what),
            console=Console(stderr=True),
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        self._bar.start()
        self._task = self._bar.add_task(self._title, total=None, what="")

    def show(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, completed=done, total=total or None, what=what)

    def end(self, seconds: float, *, succeeded: bool) -> None:
        self._bar.stop()


__all__ = ["progress", "set_progress", "silence", "tell"]
