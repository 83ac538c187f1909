"""Threads that run adapters while others replace, unload and switch them, for as long as is asked for.

Every answer must be that of an adapter that the name has or had a moment ago. ``benchmarks/serving_stress.py`` runs
this for a minute.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from adapter_compiler.errors import ConfigError
from tests.serving.models import Array, Served, call, draw_inputs, expect

#: The files that a name may stand for: ``shared`` is replaced all the time, ``guest`` comes and goes.
NAMES = {"one": ("one",), "two": ("two",), "shared": ("one", "two"), "guest": ("one", "two")}


@dataclasses.dataclass
class Counts:
    """What happened.

    Attributes:
        runs: answers by name.
        changes: adapters loaded or unloaded.
        absent: calls of the guest while it was not loaded.
        wrong: names with an answer of no adapter that they have ever had.
        errors: exceptions that should not be.
    """

    runs: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    changes: int = 0
    absent: int = 0
    wrong: list[str] = dataclasses.field(default_factory=list)
    errors: list[BaseException] = dataclasses.field(default_factory=list)


class Stress:
    """One session, and what its threads do again and again."""

    def __init__(self, served: Served) -> None:
        self.served, self.session, self.x = served, served.open(), draw_inputs()
        self.answers: Mapping[str, Array] = {n: expect(a, self.x).numpy() for n, a in served.adapted.items()}
        self.counts = Counts()
        self._files = itertools.cycle(served.adapted)
        for name, others in NAMES.items():
            self.session.load(name, served.file(others[0]))

    def replace(self) -> None:
        self.session.load("shared", self.served.file(next(self._files)))
        self.counts.changes += 1

    def come_and_go(self) -> None:
        for name in self.served.adapted:
            self.session.load("guest", self.served.file(name))
            time.sleep(0.002)
            self.session.unload("guest")
            self.counts.changes += 2

    def look(self) -> None:
        names = {*self.session, *self.session.adapters}
        assert NAMES.keys() - {"guest"} <= names <= NAMES.keys()
        assert len(self.session) in (len(NAMES) - 1, len(NAMES))

    def ask(self) -> None:
        for name, possible in NAMES.items():
            try:
                found = call(self.session, self.x, name)
            except ConfigError:
                if name != "guest":
                    raise
                self.counts.absent += 1
                continue
            self.counts.runs[name] += 1
            if not any(np.allclose(found, self.answers[one], rtol=1e-4, atol=1e-5) for one in possible):
                self.counts.wrong.append(name)


def stress(served: Served, *, seconds: float, threads: int = 4) -> Counts:
    """Run for a while, and count."""
    one, end = Stress(served), time.monotonic() + seconds

    def repeat(work: Callable[[], None]) -> None:
        try:
            while time.monotonic() < end and not one.counts.errors:
                work()
        except BaseException as error:
            one.counts.errors.append(error)

    kinds = (one.replace, one.come_and_go, one.look, *[one.ask] * threads)
    workers = [threading.Thread(target=repeat, args=(work,)) for work in kinds]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return one.counts
