"""Compile the blocks of an adapted model with ``torch.compile``.

The code of each graph is compared with eager mode when it first runs (:mod:`passes.capture.compiled_check`).

Blocks of one class share their Python code, and Dynamo keeps compiled code with the Python code and guards it by what
it has read. So blocks with equal shapes and options are compiled once. The rest of the model runs in eager mode.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.model.dispatch.scope import Token, is_hidden_somewhere
from passes.capture.compiled_check import CheckedBackend
from passes.compat import find_compiler_problem, set_compiled_call

logger = logging.getLogger(__name__)

#: How often one block may be compiled again, for other shapes, dtypes and modes, before its calls stay in eager mode.
_VARIANTS = 8


def compile_regions(module: nn.Module, names: Sequence[str], token: Token, options: Mapping[str, Any]) -> None:
    """Let calls of some submodules run code that ``torch.compile`` makes at their first call.

    Calls run in eager mode while any thread is inside ``disable_adapters``. If torch needs a C++ compiler and finds
    none, a warning says so, and nothing is compiled.

    Args:
        module: the user's module.
        names: the submodules; ``""`` is the module itself.
        token: the model's token.
        options: of ``torch.compile``.
    """
    problem = _find_problem(module, options)
    if problem is not None:
        logger.warning(
            "nothing is compiled, and calls run in eager mode: torch.compile needs a C++ compiler and %s; install one, "
            "or name it in the environment variable CXX",
            problem,
        )
        return
    options = {"recompile_limit": _VARIANTS * len(names), **options}
    options["backend"] = CheckedBackend(backend=options.get("backend", "inductor"), dynamic=options.get("dynamic"))
    for name in names:
        region = module.get_submodule(name)
        set_compiled_call(region, functools.partial(_make_call, region=region, token=token, options=options))


def _make_call(
    call: Callable[..., Any], *, region: nn.Module, token: Token, options: Mapping[str, Any]
) -> Callable[..., Any]:
    compiled = torch.compile(_make_frame(call) if _is_of_torch(region) else call, **options)

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs) if is_hidden_somewhere(token) else compiled(*args, **kwargs)

    return run


def _make_frame(call: Callable[..., Any]) -> Callable[..., Any]:
    def frame(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    return frame


def _is_of_torch(region: nn.Module) -> bool:
    """Whether ``forward`` is torch's own, which Dynamo compiles only where other code calls it."""
    forward = getattr(type(region), "users_class", type(region)).forward
    return str(getattr(forward, "__module__", "")).startswith("torch.")


def _find_problem(module: nn.Module, options: Mapping[str, Any]) -> str | None:
    if options.get("backend", "inductor") != "inductor" or options.get("disable"):
        return None
    is_on_cpu = any(parameter.device.type == "cpu" for parameter in module.parameters())
    return find_compiler_problem() if is_on_cpu else None
