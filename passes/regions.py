"""Let a module's own Python run with other code at its submodules and other values at its weights.

When a module does not capture as one graph, its Python runs as it is. While it is *rewired*, every call
of a submodule goes to a dispatcher, which may answer with a captured graph, and every look-up of an
adapted weight gives its effective value. A lone linear layer is the smallest thing that can be a graph.

Calls are rewired by an attribute ``forward`` of the instance, look-ups by a subclass with a property, as
``torch.nn.utils.parametrize`` does it; parameters, buffers and submodules stay registered as they are.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from passes.base import SiteError

#: ``dispatch(module, args, kwargs)`` answers a call of a submodule's ``forward``.
Dispatch = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]
#: ``look_up(name)`` gives the effective value of the weight with this qualified name.
LookUp = Callable[[str], torch.Tensor]


class Rewiring:
    """A module's submodules and weights, redirected or as they were.

    Attributes:
        module: the root; its own ``forward`` is never redirected.
        is_active: whether calls and look-ups are redirected at present.
    """

    def __init__(self, module: nn.Module, dispatch: Dispatch) -> None:
        self.module = module
        self.is_active = False
        self._dispatch = dispatch
        self._forwards: dict[nn.Module, Any] = {}
        self._classes: dict[nn.Module, type] = {}

    def activate(self, weights: Mapping[str, str], look_up: LookUp) -> None:
        """Redirect; nothing happens if it is active.

        Args:
            weights: qualified names of the parameters to redirect → the name to look up.
            look_up: gives their effective values.
        """
        if self.is_active:
            return
        self.is_active = True
        for child in find_callable_submodules(self.module):
            self._forwards[child] = child.__dict__.get("forward")
            child.__dict__["forward"] = functools.partial(_call, self._dispatch, child)
        owners: dict[nn.Module, dict[str, str]] = {}
        for name, looked_up in weights.items():
            path, _, leaf = name.rpartition(".")
            owners.setdefault(self.module.get_submodule(path), {})[leaf] = looked_up
        for owner, leaves in owners.items():
            if not isinstance(owner, torch.jit.ScriptModule):
                self._classes[owner] = type(owner)
                owner.__class__ = _make_subclass(type(owner), leaves, look_up)

    def deactivate(self) -> None:
        """Put everything back as it was."""
        self._undo(self._forwards, self._classes)
        self._forwards.clear()
        self._classes.clear()
        self.is_active = False

    @contextlib.contextmanager
    def undone_within(self, module: nn.Module) -> Iterator[None]:
        """Inside, a part of the model is as it was; the cost is that of the part."""
        inside = list(module.modules())  # what an outer one has undone stays undone
        own = {child: child.__dict__.get("forward") for child in inside if child in self._forwards}
        forwards = {child: forward for child, forward in own.items() if getattr(forward, "func", None) is _call}
        classes = {o: type(o) for o in inside if o in self._classes and type(o) is not self._classes[o]}
        self._undo(forwards, classes)
        try:
            yield
        finally:
            if self.is_active:
                for child, forward in forwards.items():
                    child.__dict__["forward"] = forward
                for owner, cls in classes.items():
                    owner.__class__ = cls

    def _undo(self, children: Iterable[nn.Module], owners: Iterable[nn.Module]) -> None:
        for child in children:
            del child.__dict__["forward"]
            if (forward := self._forwards[child]) is not None:
                child.__dict__["forward"] = forward
        for owner in owners:
            owner.__class__ = self._classes[owner]
            if isinstance(owner, nn.RNNBase):
                owner._init_flat_weights()

    def original_forward(self, module: nn.Module) -> Callable[..., Any]:
        """The ``forward`` that ``module`` has without us."""
        own = self._forwards.get(module) if module in self._forwards else module.__dict__.get("forward")
        forward: Callable[..., Any] = type(module).forward.__get__(module) if own is None else own
        return forward


def find_callable_submodules(module: nn.Module) -> Iterator[nn.Module]:
    """Submodules with a ``forward`` of their own in Python; containers and TorchScript have none."""
    for child in module.modules():
        if child is module or isinstance(child, torch.jit.ScriptModule):
            continue
        if type(child).forward is not nn.Module.forward or "forward" in child.__dict__:
            yield child


def _call(dispatch: Dispatch, child: nn.Module, *args: Any, **kwargs: Any) -> Any:
    return dispatch(child, args, kwargs)


def _make_subclass(cls: type, leaves: Mapping[str, str], look_up: LookUp) -> type:
    def make_property(leaf: str, name: str) -> property:
        def read(owner: nn.Module) -> Any:
            return None if owner._parameters[leaf] is None else look_up(name)

        return property(read)

    members: dict[str, Any] = {leaf: make_property(leaf, name) for leaf, name in leaves.items()}
    return type(cls.__name__, (cls,), {**members, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def find_boundaries(model: nn.Module, wanted: Sequence[str | type[nn.Module]]) -> list[str]:
    """Names of the submodules that are to be regions by themselves, by class or by glob over qualified names.

    Of matches inside each other the outermost counts.

    Raises:
        SiteError: an entry matches no submodule.
    """
    found: list[str] = []
    callable_ones = set(find_callable_submodules(model))
    named = [(name, module) for name, module in model.named_modules() if module in callable_ones]
    for entry in wanted:
        if isinstance(entry, str):
            matches = [name for name, _ in named if fnmatch.fnmatchcase(name, entry)]
        else:
            matches = [name for name, module in named if isinstance(module, entry)]
        if not matches:
            classes = sorted({type(module).__name__ for _, module in named})
            raise SiteError(
                f"regions={entry!r} matches no submodule of {type(model).__name__}; expected a glob over names such "
                f"as {named[0][0] if named else 'none'!r} or one of the classes {', '.join(classes)}"
            )
        found += [name for name in matches if not any(name.startswith(f"{outer}.") for outer in matches)]
    return list(dict.fromkeys(found))
