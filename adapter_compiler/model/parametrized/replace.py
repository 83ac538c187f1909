"""Put a computed weight in the place of a parametrization, and a parametrization back over a merged weight.

An adapter belongs to the weight that products use, W + ΔW with W as the parametrization computes it. As everything that
W is computed from is frozen, W is a constant. After training, ``right_inverse`` finds the parameters that give W + ΔW,
if there are any: always for weight_norm; not for spectral_norm and orthogonal, whose results are normalized.
"""

from __future__ import annotations

import copy
import logging
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize, remove_spectral_norm, remove_weight_norm

from adapter_compiler.errors import ConfigError
from adapter_compiler.model.parametrized.find import ParametrizedWeight, compute_weight
from passes.compat import WEIGHT_NORM_HOOKS

logger = logging.getLogger(__name__)

#: How far a weight that was written through ``right_inverse`` may be from what was written, in units in the last place
#: of its largest value.
_ULPS = 16


def assert_known(choice: str) -> None:
    """Raise :class:`ConfigError` unless this is a value of ``fold(parametrized=...)``."""
    if choice not in ("right_inverse", "remove"):
        raise ConfigError(f"fold(parametrized={choice!r}): expected 'right_inverse' or 'remove'")


def replace_by_values(model: nn.Module, weights: Iterable[ParametrizedWeight], *, has_warnings: bool = False) -> None:
    """Give the modules plain frozen weights with the present values; what computed them is removed, in place.

    Args:
        model: the model.
        weights: what to replace.
        has_warnings: whether to warn of parametrizations that the user may mean to change later.
    """
    for weight in weights:
        if has_warnings and not weight.is_of_torch:
            logger.warning(
                "%s is adapted as %s computes it now; what changes the parametrization later has no effect",
                weight.name,
                weight.kinds,
            )
        module = model.get_submodule(weight.path)
        value = compute_weight(module, weight)
        if not weight.is_hook:
            _remove(module, weight.leaf)
        elif isinstance(weight.steps[0], WEIGHT_NORM_HOOKS[0]):
            remove_weight_norm(module, weight.leaf)
        else:
            remove_spectral_norm(module, weight.leaf)
        setattr(module, weight.leaf, nn.Parameter(value, requires_grad=False))


def _remove(module: nn.Module, leaf: str) -> None:
    """As ``remove_parametrizations``, which would also change the class, that copies of a module share."""
    del module.parametrizations[leaf]  # type: ignore[union-attr, operator]
    if module.parametrizations:
        _own_class(module, without=leaf)
    else:
        del module.parametrizations
        module.__class__ = type(module).__bases__[0]


def _own_class(module: nn.Module, *, without: str = "") -> None:
    """Give a module a class of its own with the same members, all but one."""
    cls = type(module)
    members = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__", without)}
    module.__class__ = types.new_class(cls.__name__, cls.__bases__, {}, lambda names: names.update(members))


def find_flags(weights: Iterable[ParametrizedWeight], flags: Mapping[str, bool]) -> dict[str, bool]:
    """Whether each computed weight depends on a parameter that required grad."""
    return {one.name: any(flags.get(one.qualify(name), True) for name in one.originals) for one in weights}


def restore_parametrizations(
    folded: nn.Module, weights: Sequence[ParametrizedWeight], flags: Mapping[str, bool]
) -> dict[str, float]:
    """Compute the merged weights of a model by their parametrizations again, in place.

    Args:
        folded: the model, with plain weights.
        weights: what computed them.
        flags: which parameters require grad, by name.

    Returns:
        How far each weight is from the merged one, relative to its norm.

    Raises:
        ConfigError: a parametrization has no ``right_inverse``, or it does not give the merged weight.
    """
    return {weight.name: _restore(folded, weight, flags) for weight in weights}


def _restore(folded: nn.Module, weight: ParametrizedWeight, flags: Mapping[str, bool]) -> float:
    module = folded.get_submodule(weight.path)
    expected = getattr(module, weight.leaf).detach().clone()
    try:
        with torch.no_grad():
            _write(module, weight, expected)
    except (RuntimeError, ValueError, NotImplementedError, AttributeError, TypeError) as error:
        raise _refusal(weight, f"it has no right_inverse for this value ({' '.join(str(error).split())})") from error
    found = compute_weight(module, _with_steps_of(module, weight))
    largest = float(expected.abs().max())
    error_found, allowed = float((found - expected).abs().max()), _ULPS * torch.finfo(expected.dtype).eps * largest
    if not error_found <= allowed:
        raise _refusal(weight, f"its right_inverse gives a weight that differs by up to {error_found:.1e}")
    for name in weight.originals:
        parameter = module.get_parameter(name)
        parameter.requires_grad_(flags.get(weight.qualify(name), True))
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def _write(module: nn.Module, weight: ParametrizedWeight, value: torch.Tensor) -> None:
    if weight.is_hook:
        (hook,) = weight.steps
        if not isinstance(hook, WEIGHT_NORM_HOOKS[0]):
            raise NotImplementedError("spectral_norm divides by the largest singular value")
        type(hook).apply(module, weight.leaf, hook.dim)
        return
    if parametrize.is_parametrized(module):
        _own_class(module)
    for step in weight.steps:
        own = copy.deepcopy(step).to(value.device)
        parametrize.register_parametrization(module, weight.leaf, own, unsafe=True)
    setattr(module, weight.leaf, value)
    module.parametrizations.train(module.training)  # type: ignore[union-attr]


def _with_steps_of(module: nn.Module, weight: ParametrizedWeight) -> ParametrizedWeight:
    """The same for the module as it is now, whose hook is another."""
    if not weight.is_hook:
        return weight
    hooks: Iterable[Any] = module._forward_pre_hooks.values()
    steps = [one for one in hooks if isinstance(one, WEIGHT_NORM_HOOKS) and one.name == weight.leaf]
    return ParametrizedWeight(path=weight.path, leaf=weight.leaf, steps=tuple(steps), originals=weight.originals)


def _refusal(weight: ParametrizedWeight, problem: str) -> ConfigError:
    return ConfigError(
        f"fold(parametrized='right_inverse'): {weight.name} cannot be computed by {weight.kinds} after the merge: "
        f"{problem}, expected the merged weight; fold(parametrized='remove') gives a plain weight in its place"
    )
