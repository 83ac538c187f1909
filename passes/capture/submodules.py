"""Find the submodules of a model that are blocks: repeated ones, and those that the user names."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from passes.base import SiteError


def find_repeated_modules(module: nn.Module) -> list[str]:
    """Names of the blocks that a model repeats: modules of one class with the same shapes in one container.

    Where repeated blocks are nested, only the outermost are returned.
    """
    found: list[str] = []
    for name, container in module.named_modules():
        if not isinstance(container, (nn.ModuleList, nn.Sequential)) or any(name.startswith(f"{n}.") for n in found):
            continue
        kinds: dict[Any, list[str]] = {}
        for key, child in container.named_children():
            shapes = tuple((n, tuple(p.shape)) for n, p in child.named_parameters())
            if any(len(shape) > 1 for _, shape in shapes) and next(child.children(), None) is not None:
                kinds.setdefault((type(child), shapes), []).append(f"{name}.{key}" if name else key)
        found += [one for names in kinds.values() if len(names) > 1 for one in names]
    return found


def find_named_modules(model: nn.Module, wanted: Sequence[str | type[nn.Module]]) -> list[str]:
    """Names of the submodules that match a class or a glob over qualified names.

    Where matches of an entry are nested, only the outermost are returned.

    Raises:
        SiteError: an entry matches no submodule.
    """
    found: list[str] = []
    callable_ones = set(_find_callable(model))
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


def _find_callable(module: nn.Module) -> Iterator[nn.Module]:
    """Submodules that define ``forward`` in Python, unlike containers and TorchScript modules."""
    for child in module.modules():
        if child is module or isinstance(child, torch.jit.ScriptModule):
            continue
        if type(child).forward is not nn.Module.forward or "forward" in child.__dict__:
            yield child
