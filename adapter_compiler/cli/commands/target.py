"""Load a model that the user names on the command line as ``package.module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapter_compiler.errors import ConfigError

_EXPECTED = (
    "expected a function without arguments that returns (model, args, kwargs), where args is a tuple and kwargs a "
    "dict of one call"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A model and one call of it."""

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def load_target(spec: str) -> Target:
    """Import the function that ``spec`` names, call it, and check what it returns.

    Raises:
        ConfigError: there is no such module or function, or it returns something else.
    """
    place, colon, name = spec.rpartition(":")
    if not colon or not place or not name:
        raise ConfigError(f"{spec!r}: expected package.module:function or file.py:function")
    factory = getattr(_import(place), name, None)
    if not callable(factory):
        raise ConfigError(f"{spec!r}: {place} has no function {name}; {_EXPECTED}")
    return _check(spec, factory)


def with_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """An adapted model with its adapters loaded, or a plain one with them merged in.

    Raises:
        CheckpointError: the folder holds no adapters, or those of another model.
    """
    import torch

    from adapter_compiler.errors import CheckpointError
    from adapter_compiler.model.adapted_model import AdaptedModel
    from adapter_compiler.saving.adapters import load_adapters
    from adapter_compiler.saving.folders.read_folder import read_saved_adapters

    if isinstance(model, AdaptedModel):
        load_adapters(model, folder)
        return model
    saved = read_saved_adapters(folder)
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    adapted = saved.plan.by_weight
    missing = [name for name in (*adapted, *saved.replacements) if name not in tensors]
    if missing:
        raise CheckpointError(f"{folder}: the model has no weight {missing[0]}; the adapters belong to another model")
    with torch.no_grad():
        for name in adapted:
            tensors[name].copy_(saved.merge(name, tensors[name]))
        for name, key in saved.replacements.items():
            tensors[name].copy_(saved.tensor(key))
    return model


def _import(place: str) -> Any:
    if not place.endswith(".py"):
        try:
            return importlib.import_module(place)
        except ImportError as error:
            raise ConfigError(f"module {place} cannot be imported: {error}") from error
    path = Path(place).resolve()
    if not path.is_file():
        raise ConfigError(f"{place} does not exist; expected a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _check(spec: str, factory: Callable[[], Any]) -> Target:
    returned = factory()
    if not isinstance(returned, tuple) or len(returned) != 3 or not isinstance(returned[0], nn.Module):
        raise ConfigError(f"{spec!r} returned a {type(returned).__name__}; {_EXPECTED}")
    model, args, kwargs = returned
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"{spec!r} returned args of {type(args).__name__}, kwargs of {type(kwargs).__name__}; {_EXPECTED}"
        )
    return Target(model=model, args=tuple(args), kwargs=dict(kwargs))
