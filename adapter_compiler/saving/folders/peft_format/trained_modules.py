"""What was trained fully beside adapters, as PEFT saves it: whole modules, and biases of adapted modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import nn

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.layer_kinds import (
    TrainedNames,
    find_modules_like,
    find_outermost,
    find_owners,
    is_bias_of,
    is_inside,
)

#: Buffers of normalization layers, which move in training whether or not their module is trained.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTensors:
    """Tensors that go along with adapters.

    Attributes:
        modules: what PEFT's ``modules_to_save`` names.
        tensors: all tensors of these modules, by qualified name.
        biases: the trained biases of adapted modules.
    """

    modules: tuple[str, ...] = ()
    tensors: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    biases: Mapping[str, torch.Tensor] = dataclasses.field(default_factory=dict)


def find_trained(model: nn.Module, adapted: Collection[str]) -> TrainedTensors:
    """What of a model requires gradients.

    PEFT keeps a trained copy of each module whose name ends with an entry of ``modules_to_save``, with all tensors in
    it; it looks for adapters in none of them.

    Args:
        model: the user's module.
        adapted: the names of the modules with adapters.

    Raises:
        ConfigError: PEFT cannot express what was trained.
    """
    owners = find_owners(model)
    state = model.state_dict(keep_vars=True)
    biases = {name: state[name] for name in owners if is_bias_of(name, adapted)}
    heads = _find_heads(owners, adapted)
    modules = find_modules_like(model, heads)
    _assert_apart(heads, modules, adapted)
    prefixes = tuple(f"{name}." for name in modules)
    tensors = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    return TrainedTensors(modules=tuple(heads), tensors=tensors, biases=biases)


def group_trained(
    tensors: Mapping[str, torch.Tensor], adapted: Collection[str], names: TrainedNames | None, path: Path
) -> TrainedTensors:
    """What a file of adapters holds besides, without the model's code.

    Buffers that moved in training (running statistics) have no place in PEFT's format and are left out, unless they
    belong to a module whose parameters were trained fully.

    Args:
        tensors: fully trained parameters, and buffers, by qualified name.
        adapted: the names of the modules with adapters.
        names: what the file says of the parameters; ``None`` if it is of a version that said nothing.
        path: the file, for messages.

    Raises:
        ConfigError: PEFT cannot express what was trained, or the file does not hold all that PEFT saves of it.
    """
    names = _guess_names(tensors, path) if names is None else names
    heads = _find_heads(names.owners, adapted)
    _assert_apart(heads, heads, adapted)
    if missing := [name for name in (*names.owners, *names.unsaved) if name not in tensors]:
        raise ConfigError(
            f"{path} does not hold {missing[0]}, expected all tensors of the modules that were trained fully "
            f"({', '.join(heads)}) and of those whose names end alike, because PEFT saves them whole; load the "
            "adapters into the model and call save_peft_adapters"
        )
    biases = {name: tensors[name] for name in names.owners if is_bias_of(name, adapted)}
    kept = {name: tensor for name, tensor in tensors.items() if is_inside(name, heads)}
    return TrainedTensors(modules=tuple(heads), tensors=kept, biases=biases)


def _guess_names(tensors: Mapping[str, torch.Tensor], path: Path) -> TrainedNames:
    """Parameters that were called ``weight`` and ``bias``; another name may be that of a parameter or of a buffer."""
    owners = {name: name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in ("weight", "bias")}
    for name, tensor in tensors.items():
        known = name in owners or name.rpartition(".")[2] in _STATISTICS or is_inside(name, owners.values())
        if tensor.is_floating_point() and not known:
            raise ConfigError(
                f"{path} does not say whether {name} is a parameter that was trained or a buffer, expected one or the "
                "other, because PEFT saves trained modules only; save the adapters again with this version"
            )
    return TrainedNames(owners=owners)


def _find_heads(owners: Mapping[str, str], adapted: Collection[str]) -> list[str]:
    """The modules that PEFT saves whole."""
    for name, owner in owners.items():
        if not owner and not is_bias_of(name, adapted):
            raise ConfigError(
                f"{name} is a parameter of the model itself and was trained fully, PEFT saves those of its submodules "
                "only; freeze it, move it into a submodule, or save with save()"
            )
    return find_outermost(owner for name, owner in owners.items() if not is_bias_of(name, adapted))


def _assert_apart(heads: Collection[str], modules: Collection[str], adapted: Collection[str]) -> None:
    for module in modules:
        inside = [name for name in adapted if is_inside(name, [module]) or is_inside(module, [name])]
        if inside:
            raise ConfigError(
                f"module {module} has parameters that were trained fully and {inside[0]} has an adapter, PEFT has one "
                f"or the other for a module (it takes every module whose name ends with {', '.join(heads)}); train "
                "only the bias besides, exclude the site, or save with save()"
            )
