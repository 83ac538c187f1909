"""Closures of an optimizer step: ``optimizer.step(closure)`` computes the gradients inside the step.

Lightning calls every optimizer in this way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

#: The arguments of a step: positional ones, of which the optimizer is the first, and keyword arguments.
StepArguments = tuple[tuple[Any, ...], dict[str, Any]]


def call_after_closure(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], then: Callable[[], None]
) -> StepArguments | None:
    """The arguments of a step with a closure that calls ``then`` after each evaluation, or ``None`` without a closure.

    Args:
        args: positional arguments of the step, the optimizer first.
        kwargs: keyword arguments of the step.
        then: called when the closure has computed the gradients.
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
