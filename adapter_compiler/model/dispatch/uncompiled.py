"""Run a function that Dynamo must not trace.

Only code that Dynamo traces imports this module, because ``torch.compiler.disable`` imports Dynamo, which takes several
times as long as all of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def run_uncompiled(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)`` in eager mode, also inside of compiled code."""
    return function(*args)
