"""Public names whose modules are imported when they are first asked for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def import_on_demand(package: str, places: Mapping[str, str]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` (PEP 562) for names that live in other modules.

    onnxruntime, onnx-ir and onnxscript take seconds and a hundred megabytes, which a program that only trains,
    or folds files, need not pay.

    Args:
        package: the module's own name, for messages.
        places: name → the module that it is imported from.
    """

    def get(name: str) -> Any:
        if name not in places:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(places[name]), name)

    return get
