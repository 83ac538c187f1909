"""Subclasses of ``AdaptedModel`` whose ``forward`` has the signature of the user's module, and its special methods.

Libraries inspect the signature to find the inputs of a model: transformers' Trainer drops the columns of a data set
that are not parameters of ``forward``, and finds the labels by their name. It inspects the class, not the instance.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any

from torch import nn

_made: weakref.WeakKeyDictionary[type, dict[type, type]] = weakref.WeakKeyDictionary()


def make_signed_class(cls: type, module: nn.Module) -> type:
    """The subclass of ``cls`` for modules like this one; one for each class, unless an instance has its own forward."""
    users: type = getattr(type(module), "users_class", type(module))
    if "forward" in vars(module):
        return _make(cls, users, _find_signature(module.forward, is_bound=True))
    known = _made.setdefault(users, {})
    if cls not in known:
        forward: Any = vars(users).get("forward") or getattr(users, "forward", None)
        known[cls] = _make(cls, users, _find_signature(forward, is_bound=False))
    return known[cls]


def _find_signature(forward: Any, *, is_bound: bool) -> inspect.Signature | None:
    """The signature with ``self``; ``None`` where Python does not know it, as of TorchScript's."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return None
    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)] if is_bound else []
    return signature.replace(parameters=[*own, *signature.parameters.values()])


#: Methods that Python looks up on the class: ``adapted[0]``, ``len(adapted)``, ``for layer in adapted``.
_SPECIAL = ("__getitem__", "__setitem__", "__delitem__", "__len__", "__iter__", "__contains__", "__reversed__")


def _pass_on(special: str) -> Any:
    def run(self: Any, *args: Any) -> Any:
        """The same method of the user's module."""
        return getattr(type(self.module), special)(self.module, *args)

    return run


def _make(cls: type, users: type, signature: inspect.Signature | None) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for these arguments, with the adapters."""
        return self.run_module(args, kwargs)

    if signature is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    members: dict[str, Any] = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    members |= {special: _pass_on(special) for special in _SPECIAL if hasattr(users, special)}
    return types.new_class(f"Adapted{users.__name__}", (cls,), {}, lambda names: names.update(members))
