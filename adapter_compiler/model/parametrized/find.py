"""Find the weights of a model that parametrizations compute, by torch's present way and by its former one."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from passes.compat import SPECTRAL_NORM, WEIGHT_NORM_HOOKS, is_of_class


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParametrizedWeight:
    """A weight that is computed from other parameters.

    Attributes:
        path: the qualified name of the module.
        leaf: the name of the weight in it.
        steps: what computes it, in order: modules of ``parametrize``, or one hook of the former functions.
        originals: the names of the parameters that it is computed from, in the module.
    """

    path: str
    leaf: str
    steps: tuple[Any, ...]
    originals: tuple[str, ...]

    @property
    def name(self) -> str:
        """The qualified name of the weight."""
        return self.qualify(self.leaf)

    @property
    def is_hook(self) -> bool:
        """Whether it is computed by a hook before each call, as of ``torch.nn.utils.weight_norm``."""
        return not isinstance(self.steps[0], nn.Module)

    @property
    def kinds(self) -> str:
        """The names of the classes that compute it."""
        return ", ".join(type(step).__name__.lstrip("_") for step in self.steps)

    @property
    def is_of_torch(self) -> bool:
        """Whether torch's own classes compute it."""
        return all(type(step).__module__.startswith("torch.nn.utils.") for step in self.steps)

    def qualify(self, leaf: str) -> str:
        """The qualified name of a parameter of the module."""
        return f"{self.path}.{leaf}" if self.path else leaf


def find_parametrized(model: nn.Module, trainable: Collection[str]) -> tuple[ParametrizedWeight, ...]:
    """The matrices that are computed from frozen parameters, and are the same in each call.

    Left out, and so adapted at the parameters they are computed from, are those that share these with others, and those
    that are random or change in calls; of the latter, spectral normalization converges to what it gives without
    iterations, and is included.

    Args:
        model: the model; it does not change.
        trainable: the parameters that are trained fully, by qualified name.
    """
    counts: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        counts[id(parameter)] = counts.get(id(parameter), 0) + 1
    found = []
    for path, module in model.named_modules():
        for weight in (*_find_new(path, module), *_find_former(path, module)):
            owned = [module.get_parameter(name) for name in weight.originals]
            is_shared = any(counts[id(parameter)] > 1 for parameter in owned)
            inner = {name for name, _ in module.named_parameters(prefix=path)}
            is_trained = any(weight.qualify(name) in trainable for name in weight.originals) or bool(
                {n for n in inner if f".{weight.leaf}." in n} & set(trainable)
            )
            if not (is_shared or is_trained) and _is_usable(module, weight):
                found.append(weight)
    return tuple(found)


def compute_weight(module: nn.Module, weight: ParametrizedWeight) -> torch.Tensor:
    """The weight as it is now, without iterations of spectral normalization; memory of its own."""
    with torch.no_grad():
        if weight.is_hook:
            (hook,) = weight.steps
            is_spectral = not isinstance(hook, WEIGHT_NORM_HOOKS[0])
            value = hook.compute_weight(module, **({"do_power_iteration": False} if is_spectral else {}))
        else:
            parts = _parts_of(module)[weight.leaf]
            with _in_mode(parts, is_training=False):
                value = parts()
        result: torch.Tensor = value.detach().clone()
        return result


def _find_new(path: str, module: nn.Module) -> Iterator[ParametrizedWeight]:
    if not parametrize.is_parametrized(module):
        return
    for leaf, parts in _parts_of(module).items():
        names = ("original",) if parts.is_tensor else tuple(f"original{i}" for i in range(parts.ntensors))
        if all(isinstance(getattr(parts, name), nn.Parameter) for name in names):
            originals = tuple(f"parametrizations.{leaf}.{name}" for name in names)
            yield ParametrizedWeight(path=path, leaf=leaf, steps=tuple(parts), originals=originals)


def _find_former(path: str, module: nn.Module) -> Iterator[ParametrizedWeight]:
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_NORM_HOOKS):
            is_weight_norm = isinstance(hook, WEIGHT_NORM_HOOKS[0])
            names = (f"{hook.name}_g", f"{hook.name}_v") if is_weight_norm else (f"{hook.name}_orig",)
            yield ParametrizedWeight(path=path, leaf=hook.name, steps=(hook,), originals=names)


def _parts_of(module: nn.Module) -> Any:
    """The lists of parametrizations by the name of the weight."""
    return module.parametrizations


def _is_usable(module: nn.Module, weight: ParametrizedWeight) -> bool:
    value = compute_weight(module, weight)
    if value.dim() < 2 or not value.is_floating_point():
        return False
    return weight.is_hook or value.is_meta or _is_constant(module, weight, value)


def _is_constant(module: nn.Module, weight: ParametrizedWeight, value: torch.Tensor) -> bool:
    """Whether reads while training give the same value, whatever random numbers are drawn."""
    if any(is_of_class(step, SPECTRAL_NORM) for step in weight.steps):
        return True
    parts = _parts_of(module)[weight.leaf]
    before = {name: buffer.clone() for name, buffer in parts.named_buffers()}
    with torch.no_grad(), _in_mode(parts, is_training=True), torch.random.fork_rng(devices=[]):
        reads = [parts() for _ in range(2)]
        changed = any(not torch.equal(buffer, before[name]) for name, buffer in parts.named_buffers())
        for name, buffer in parts.named_buffers():
            buffer.copy_(before[name])
    return not changed and all(torch.equal(read, value) for read in reads)


@contextlib.contextmanager
def _in_mode(module: nn.Module, *, is_training: bool) -> Iterator[None]:
    modes = {child: child.training for child in module.modules()}
    module.train(is_training)
    try:
        yield
    finally:
        for child, mode in modes.items():
            child.training = mode
