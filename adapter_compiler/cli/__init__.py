"""The command line: its commands, the code that they share, and the demo."""

from __future__ import annotations

from adapter_compiler.onnx.lazy_imports import import_on_demand

__getattr__ = import_on_demand(__name__, {"app": "adapter_compiler.cli.main"})
