"""Several threads at once: first and later calls, disabled adapters, folds, hooks, copies."""

from __future__ import annotations

import copy
import io
import logging
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from tests.soundness.common import WIDTH, adapt, make, seed
from tests.soundness.oracle import Oracle

THREADS, CALLS = 4, 200


def compute(net: Any, x: Tensor) -> Any:
    y = net.second(net.norm(torch.tanh(net.first(x)))) @ net.raw
    return net.inner(y) if bool(y.sum() > 0) else y


def remember_process() -> list[Any]:
    """The state of the process that a call must not change."""
    loggers = [logging.getLogger(name) for name in ("", "torch", "torch._dynamo", "adapter_compiler", "transformers")]
    functions = [nn.Module.to, nn.Module.__call__, nn.Module.__getattr__, nn.Module.__setattr__, nn.Linear.forward]
    levels = [(one.level, one.disabled, tuple(one.filters)) for one in loggers]
    flags = (torch.is_grad_enabled(), torch.backends.mha.get_fastpath_enabled(), torch.is_autocast_enabled("cpu"))
    return [sys.stdout, sys.stderr, sys.getswitchinterval(), *functions, *levels, *flags, nn.functional.linear]


@pytest.fixture(autouse=True)
def _many_switches() -> Iterator[None]:
    """Switch threads a hundred times more often than the default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-5)
    state = remember_process()
    yield
    after = remember_process()
    sys.setswitchinterval(before)
    assert all(one is other or one == other for one, other in zip(state, after, strict=True))


def run_threads(works: Sequence[Callable[[int], Any]], count: int = CALLS) -> list[str]:
    """Run each function repeatedly in its own thread; returns the errors."""
    wrong: list[str] = []
    barrier = threading.Barrier(len(works))

    def run(number: int, work: Callable[[int], Any]) -> None:
        try:
            barrier.wait()
            for i in range(count):
                if message := work(i):
                    wrong.append(f"thread {number}, call {i}: {message}")
        except Exception as error:  # otherwise the thread would end silently
            wrong.append(f"thread {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=run, args=pair) for pair in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return wrong


class Shared:
    """A model that all threads call, and the expected results."""

    def __init__(self, *, training: bool = False, has_example: bool = True, **options: Any) -> None:
        seed(1)
        self.base = make(compute)().train(training)
        self.inputs = [torch.randn(2, WIDTH) * (i + 1) / 3 for i in range(6)]
        self.adapted = adapt(self.base, (self.inputs[0],) if has_example else (), **options)
        self.oracle = Oracle(self.adapted, self.base).model
        self.with_adapters = [self.oracle(x).detach() for x in self.inputs]
        self.without = [self.base(x).detach() for x in self.inputs]

    def call(self, i: int) -> str | None:
        return self.judge(self.adapted(self.inputs[i % 6]), self.with_adapters[i % 6])

    def call_module(self, i: int) -> str | None:
        return self.judge(self.adapted.module(self.inputs[i % 6]), self.with_adapters[i % 6])

    def call_without_gradient(self, i: int) -> str | None:
        with torch.no_grad():
            return self.call(i)

    def call_disabled(self, i: int) -> str | None:
        with self.adapted.disable_adapters():
            with self.adapted.disable_adapters():
                found = self.judge(self.adapted(self.inputs[i % 6]), self.without[i % 6])
            return found or self.judge(self.adapted(self.inputs[(i + 1) % 6]), self.without[(i + 1) % 6])

    def call_in_turns(self, i: int) -> str | None:
        return self.call(i) or self.call_disabled(i) or self.call(i)

    def fold(self, i: int) -> str | None:
        return self.judge(self.adapted.fold()(self.inputs[i % 6]), self.with_adapters[i % 6])

    def copy(self, i: int) -> str | None:
        return self.judge(copy.deepcopy(self.adapted)(self.inputs[i % 6]), self.with_adapters[i % 6])

    def differentiate(self, i: int) -> str | None:
        parameters = list(self.adapted.adapters.parameters())
        y = self.adapted(self.inputs[i % 6])
        found: Sequence[Tensor | None] = torch.autograd.grad(y.sum(), parameters, allow_unused=True)
        is_finite = all(bool(g.isfinite().all()) for g in found if g is not None)
        missing = sum(g is None for g in found)
        return None if is_finite and missing < len(found) else "no gradient"

    def judge(self, found: Tensor, expected: Tensor) -> str | None:
        distance = float((found.detach() - expected).abs().max())
        return None if distance < 1e-4 * (1 + float(expected.abs().max())) else f"{distance} off"


OPTIONS: dict[str, dict[str, Any]] = {
    "example": {},
    "bare": {"has_example": False},
    "checkpoint": {"training": True, "checkpoint": True},
    "dora": {"kind": "dora"},
}


@pytest.mark.parametrize(
    "options",
    [pytest.param(o, id=n, marks=pytest.mark.slow if n != "example" else []) for n, o in OPTIONS.items()],
)
def test_calls(options: dict[str, Any]) -> None:
    shared = Shared(**options)
    assert run_threads([shared.call] * THREADS) == []


def test_every_kind_of_call_at_once() -> None:
    shared = Shared()
    works = [shared.call, shared.call_module, shared.call_without_gradient, shared.call_disabled]
    assert run_threads(works) == []


def test_adapters_are_disabled_in_some_threads() -> None:
    shared = Shared()
    assert run_threads([shared.call, shared.call_disabled, shared.call_in_turns, shared.call_disabled]) == []
    assert shared.call(0) is None


def test_folds_and_copies_during_calls() -> None:
    shared = Shared()
    assert run_threads([shared.fold, shared.call, shared.copy, shared.call_in_turns], CALLS // 4) == []


def test_gradients_during_disabled_calls() -> None:
    shared = Shared(training=True, checkpoint=True)
    works = [shared.differentiate, shared.call_disabled, shared.differentiate, shared.call]
    assert run_threads(works, CALLS // 4) == []


def test_hooks_on_the_model() -> None:
    seed(1)
    seen: list[int] = []
    shared = Shared()
    shared.adapted.module.get_submodule("first").register_forward_hook(lambda m, args, y: seen.append(1))
    shared.adapted.register_forward_pre_hook(lambda m, args: seen.append(1))
    shared.adapted.module.register_forward_hook(lambda m, args, y: y * 1)
    assert run_threads([shared.call] * THREADS) == []
    assert len(seen) == 2 * THREADS * CALLS


def test_first_calls_of_many_models() -> None:
    """Models are compiled and first called in several threads at once."""

    def work(i: int) -> str | None:
        model = make(compute)().eval()
        x = torch.ones(2, WIDTH)
        adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2, sites="*"))
        with torch.no_grad():
            for parameter in adapted.adapters.parameters():
                parameter.add_(0.3)
        return Shared.judge(shared, adapted(x), adapted.fold()(x))

    shared = Shared()
    assert run_threads([work] * THREADS, 4) == []


def test_compiling_during_calls_of_another_model() -> None:
    shared = Shared()

    def compile_another(i: int) -> str | None:
        other = Shared()
        return other.call(i) or other.call_disabled(i)

    assert run_threads([compile_another], 1) == []
    done = threading.Event()

    def call_until_done(i: int) -> str | None:
        while not done.is_set():
            if message := shared.call_in_turns(i):
                return message
        return None

    def compile_some(i: int) -> str | None:
        try:
            return next((m for m in map(compile_another, range(4)) if m), None)
        finally:
            done.set()

    assert run_threads([compile_some, call_until_done, call_until_done], 1) == []


def test_an_error_in_a_call_changes_nothing() -> None:
    shared = Shared()
    with pytest.raises(RuntimeError), shared.adapted.disable_adapters():
        shared.adapted(torch.randn(2, WIDTH + 1))
    assert shared.call(1) is None
    assert not isinstance(sys.stdout, io.StringIO)
