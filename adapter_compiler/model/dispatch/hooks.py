"""Hooks that users register on an adapted weight, which outlive the tensor that a read gives."""

from __future__ import annotations

import collections
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

Hook = Callable[[torch.Tensor], Any]


class WeightHooks:
    """Hooks on the gradient of W + ΔW.

    They belong to the parameter W, as in a model without adapters: names that share W share them, a parameter that
    takes its place has none, and they are not copied.
    """

    def __init__(self) -> None:
        self._known: list[tuple[weakref.ref[torch.Tensor], collections.OrderedDict[int, Hook]]] = []

    def belong_to(self, parameter: torch.Tensor) -> bool:
        """Whether there are hooks for this W."""
        return bool(self._known) and bool(self._find(parameter))

    def add(self, parameter: torch.Tensor, hook: Hook) -> RemovableHandle:
        """Add a hook for this W; the handle removes it."""
        hooks = self._find(parameter)
        if hooks is None:
            hooks = collections.OrderedDict()
            self._known = [*(one for one in self._known if one[0]() is not None), (weakref.ref(parameter), hooks)]
        handle = RemovableHandle(hooks)
        hooks[handle.id] = hook
        return handle

    def make_runner(self, parameter: torch.Tensor) -> Hook:
        """A hook that runs those that this W, which has some, has at the time of backward."""
        return functools.partial(_run, self._find(parameter) or collections.OrderedDict())

    def _find(self, parameter: torch.Tensor) -> collections.OrderedDict[int, Hook] | None:
        return next((hooks for known, hooks in self._known if known() is parameter), None)

    def __deepcopy__(self, memo: dict[int, Any]) -> WeightHooks:
        return WeightHooks()

    def __reduce__(self) -> Any:
        return WeightHooks, ()


def _run(hooks: collections.OrderedDict[int, Hook], gradient: torch.Tensor) -> torch.Tensor:
    for hook in tuple(hooks.values()):
        result = hook(gradient)
        gradient = gradient if result is None else result
    return gradient
