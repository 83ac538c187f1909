"""Public names whose modules are imported at first use."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def import_on_demand(package: str, modules: Mapping[str, str]) -> Callable[[str], Any]:
    """A ``__getattr__`` for a module (PEP 562) that imports names from other modules at first use.

    onnxruntime, onnx-ir and onnxscript take seconds and about 100 MB to import. A program that only trains, or only
    folds files, does not need them.

    Args:
        package: the module's own name, for messages.
        modules: for each name, the module that defines it.
    """

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(modules[name]), name)

    return get
