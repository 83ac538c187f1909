"""Adapters are replaced, unloaded and switched while other threads run them: the old or the new one answers."""

from __future__ import annotations

import subprocess
import sys
import threading

import numpy as np
import pytest

from adapter_compiler.errors import ConfigError
from tests.serving.models import Array, Served, call, draw_inputs, expect
from tests.serving.stress import NAMES, stress
from tests.source_files import ROOT


def check(served: Served, seconds: float) -> None:
    counts = stress(served, seconds=seconds)
    assert counts.errors == []
    assert counts.wrong == []
    assert counts.runs.keys() | {"guest"} == NAMES.keys()
    assert counts.runs["guest"] + counts.absent > 0
    assert counts.changes > 10


def test_threads_get_the_old_or_the_new_adapter(served: Served) -> None:
    check(served, 2.0)


@pytest.mark.slow
def test_threads_get_the_old_or_the_new_adapter_for_longer(served: Served) -> None:
    check(served, 10.0)


def test_an_adapter_that_is_unloaded_during_its_run_answers(served: Served) -> None:
    """Many runs begin, each in a thread that has looked the adapter up before it is unloaded."""
    session, x = served.open(), draw_inputs(256)
    expected = expect(served.adapted["one"], x).numpy()
    session.load("a", served.file("one"))
    answers: list[Array] = []
    begun = threading.Semaphore(0)
    run = session.session.run

    def run_and_tell(*args: object) -> object:
        begun.release()
        return run(*args)

    session.session.run = run_and_tell
    threads = [threading.Thread(target=lambda: answers.append(call(session, x, "a"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in threads:
        begun.acquire()
    session.unload("a")
    for thread in threads:
        thread.join()
    assert len(answers) == 8
    for found in answers:
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="no adapter 'a' is loaded; loaded: none"):
        call(session, x, "a")


def test_iterating_sees_the_adapters_of_one_moment(served: Served) -> None:
    session = served.open()
    session.load("a", served.file("one"))
    names, before = iter(session), session.adapters
    session.load("b", served.file("two"))
    session.unload("a")
    assert list(names) == ["a"]
    assert list(before) == ["a"]
    assert list(session) == ["b"]


@pytest.mark.slow
def test_the_command_for_a_longer_time() -> None:
    command = [sys.executable, "-m", "benchmarks.serving_stress", "--seconds", "2"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 wrong answers, errors: none" in done.stdout
