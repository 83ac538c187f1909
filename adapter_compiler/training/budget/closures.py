"""Optimizers that compute the gradients inside their step: ``optimizer.step(closure)``, as Lightning calls all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: What a step was called with: the optimizer and the other arguments, and those by name.
StepArguments = tuple[tuple[Any, ...], dict[str, Any]]


def call_after_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], then: Callable[[], None]
) -> StepArguments | None:
    """The arguments of a step with a closure after each call of which ``then`` is called, or ``None`` without one.

    Args:
        args: of the step, the optimizer first.
        kwargs: of the step.
        then: what is to happen when the gradients are there.
    """
    if not any(callable(value) for value in (*args[1:], *kwargs.values())):
        return None

    def wrap(value: Any) -> Any:
        return _chain(value, then) if callable(value) else value

    return (*args[:1], *map(wrap, args[1:])), {name: wrap(value) for name, value in kwargs.items()}


def _chain(closure: Callable[..., Any], then: Callable[[], None]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        result = closure(*args, **kwargs)
        then()
        return result

    return run
