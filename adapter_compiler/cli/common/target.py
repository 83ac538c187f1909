"""Load the model of a function given on the command line as ``package.module:function`` or ``file.py:function``."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from adapter_compiler.errors import AdapterCompilerError, ConfigError

#: What commands say of the options for data and a metric.
DATA_HELP = (
    "FILE.py:FUNCTION that returns batches of real inputs: a list, a generator, a DataLoader or a Dataset. A batch is "
    "a tensor, a tuple or a dict of the model's arguments, or (inputs, labels)."
)
METRIC_HELP = (
    "With --data: FILE.py:FUNCTION, called as metric(outputs, batch) with a dict of tensors and a whole batch."
)

#: What commands say of such an argument.
TARGET_HELP = (
    "FILE.py:FUNCTION or MODULE:FUNCTION. The code is run: the module is imported, and the function is called to get "
    "(model, args, kwargs)."
)

_EXPECTED = (
    "expected a function without arguments that returns (model, args, kwargs), where args is the tuple and kwargs the "
    "dict of arguments of one call"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """A model and the arguments of one call of it."""

    model: nn.Module
    args: Sequence[Any]
    kwargs: Mapping[str, Any]


def load_target(spec: str) -> Target:
    """Import the function that ``spec`` names, call it, and check its result.

    Raises:
        ConfigError: there is no such module or function, the user's code raises, or its result is not (model, args,
            kwargs).
    """
    return _check(spec, call_function(spec, _EXPECTED))


def call_function(spec: str, expected: str) -> Any:
    """Import the function that ``spec`` names, and call it; returns what it returns.

    Args:
        spec: ``package.module:function`` or ``file.py:function``.
        expected: what errors say that the function should be.

    Raises:
        ConfigError: there is no such module or function, or the user's code raises.
    """
    factory = find_function(spec, expected)
    with _explained(spec, expected):
        return factory()


def find_function(spec: str, expected: str) -> Callable[..., Any]:
    """Import the function that ``spec`` names.

    Args:
        spec: ``package.module:function`` or ``file.py:function``.
        expected: what errors say that the function should be.

    Raises:
        ConfigError: there is no such module or function, or the user's code raises.
    """
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise ConfigError(f"{spec!r}: expected package.module:function or file.py:function")
    with _explained(spec, expected):
        found = getattr(_import(source), name, None)
    if not callable(found):
        raise ConfigError(f"{spec!r}: {source} has no function {name}; {expected}")
    return found  # type: ignore[no-any-return]


def load_data(data: str | None, metric: str | None) -> tuple[Any, Callable[..., Any] | None]:
    """The samples and the metric of the options ``--data`` and ``--metric``.

    Raises:
        ConfigError: there is a metric without data, no such function, or the user's code raises.
    """
    if data is None:
        if metric is not None:
            raise ConfigError("--metric is given without --data, expected samples to measure it on; give --data")
        return None, None
    found = None if metric is None else find_function(metric, "expected a function metric(outputs, batch)")
    samples = call_function(data, "expected a function without arguments that returns batches")
    return list(samples) if isinstance(samples, Iterator) else samples, found


@contextlib.contextmanager
def _explained(spec: str, expected: str) -> Iterator[None]:
    """Let an exception of the user's code say in one line where it comes from; those of this library say it already."""
    try:
        yield
    except AdapterCompilerError:
        raise
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
        raise ConfigError(
            f"{spec!r}: its code raises {reason} ({_find_place(error)}); {expected}; "
            "run it by itself, or add --traceback to see the calls that led there"
        ) from error


def _find_place(error: BaseException) -> str:
    """The file and line of the user's code that an exception comes from, or that cannot be parsed."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"line {error.lineno} of {Path(error.filename).name}"
    libraries = tuple(sysconfig.get_path(kind) for kind in ("stdlib", "purelib", "platlib"))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__]
    own = [f for f in frames if not f.filename.startswith((*libraries, "<frozen"))]
    frame = (own or frames)[-1]
    return f"line {frame.lineno} of {Path(frame.filename).name}"


def with_adapters(model: nn.Module, folder: Path) -> nn.Module:
    """The model with the adapters of a folder: loaded into an adapted model, or merged into a plain one.

    Raises:
        CheckpointError: the folder has no adapters, or they belong to another model.
    """
    import torch

    from adapter_compiler.errors import CheckpointError
    from adapter_compiler.model.adapted_model import AdaptedModel
    from adapter_compiler.saving.adapters import load_adapters
    from adapter_compiler.saving.folders.live_models import fit_to_model
    from adapter_compiler.saving.folders.read_folder import read_saved_adapters

    if isinstance(model, AdaptedModel):
        load_adapters(model, folder)
        return model
    saved = fit_to_model(read_saved_adapters(folder), model)
    tensors = {**dict(model.named_buffers()), **dict(model.named_parameters())}
    adapted = saved.changed
    missing = [name for name in (*adapted, *saved.replacements) if name not in tensors]
    if missing:
        raise CheckpointError(
            f"{folder} has values for {missing[0]}, which the model does not have; expected adapters of this model; "
            "give the model that they were trained on"
        )
    with torch.no_grad():
        for name in adapted:
            tensors[name].copy_(saved.merge(name, tensors[name]))
        for name, key in saved.replacements.items():
            tensors[name].copy_(saved.tensor(key))
    return model


def _import(source: str) -> Any:
    if not source.endswith(".py"):
        try:
            return importlib.import_module(source)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{source}.".startswith(f"{error.name}."):
                raise
            raise ConfigError(
                f"module {source} cannot be imported: {error}; expected one in this folder or an installed one"
            ) from error
    path = Path(source).resolve()
    if not path.is_file():
        raise ConfigError(f"{source} does not exist; expected a Python file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _check(spec: str, returned: object) -> Target:
    if not isinstance(returned, tuple) or len(returned) != 3 or not isinstance(returned[0], nn.Module):
        raise ConfigError(f"{spec!r} returned a {type(returned).__name__}; {_EXPECTED}")
    model, args, kwargs = returned
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise ConfigError(
            f"{spec!r} returned args of {type(args).__name__}, kwargs of {type(kwargs).__name__}; {_EXPECTED}"
        )
    return Target(model=model, args=tuple(args), kwargs=dict(kwargs))
