"""Subclasses of ``AdaptedModel`` whose ``forward`` has the signature of the user's module.

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
    if "forward" in vars(module):
        return _make(cls, type(module).__name__, _find_signature(module.forward, is_bound=True))
    users: type = getattr(type(module), "users_class", type(module))
    known = _made.setdefault(users, {})
    if cls not in known:
        forward: Any = vars(users).get("forward") or getattr(users, "forward", None)
        known[cls] = _make(cls, users.__name__, _find_signature(forward, is_bound=False))
    return known[cls]


def _find_signature(forward: Any, *, is_bound: bool) -> inspect.Signature | None:
    """The signature with ``self``; ``None`` where Python does not know it, as of TorchScript's."""
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):
        return None
    own = [inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)] if is_bound else []
    return signature.replace(parameters=[*own, *signature.parameters.values()])


def _make(cls: type, name: str, signature: inspect.Signature | None) -> type:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for these arguments, with the adapters."""
        return self.run_module(args, kwargs)

    if signature is not None:
        forward.__signature__ = signature  # type: ignore[attr-defined]
    members = {"forward": forward, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return types.new_class(f"Adapted{name}", (cls,), {}, lambda names: names.update(members))
