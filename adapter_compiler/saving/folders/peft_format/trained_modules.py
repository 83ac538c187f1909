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

#: Buffers of normalization layers, which are taken to have moved where a file does not say.
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

#: What the names of the modules end with that PEFT puts into a layer with an adapter.
_INNER = (
    ".base_layer",
    ".default",
    ".lora_A",
    ".lora_B",
    ".lora_E",
    ".lora_dropout",
    ".lora_embedding_A",
    ".lora_embedding_B",
    ".lora_magnitude_vector",
    ".ranknum",
)


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


def find_trained(model: nn.Module, adapted: Collection[str], moved: Collection[str] = ()) -> TrainedTensors:
    """What of a model requires gradients, and the modules with buffers that training has moved.

    PEFT keeps a trained copy of each module whose name ends with an entry of ``modules_to_save``, with all tensors in
    it, buffers too; it looks for adapters in none of them.

    Args:
        model: the user's module.
        adapted: the names of the modules with adapters.
        moved: the names of buffers with other values than those of the base, such as running statistics.

    Raises:
        ConfigError: PEFT cannot express what was trained.
    """
    owners = find_owners(model)
    state = model.state_dict(keep_vars=True)
    biases = {name: state[name] for name in owners if is_bias_of(name, adapted)}
    heads = _find_heads(owners, adapted, moved)
    modules = find_modules_like(model, heads)
    _assert_apart(heads, modules, adapted, moved)
    prefixes = tuple(f"{name}." for name in modules)
    tensors = {name: tensor for name, tensor in state.items() if name.startswith(prefixes)}
    return TrainedTensors(modules=tuple(heads), tensors=tensors, biases=biases)


def group_trained(
    tensors: Mapping[str, torch.Tensor], adapted: Collection[str], names: TrainedNames | None, path: Path
) -> TrainedTensors:
    """What a file of adapters holds besides, without the model's code.

    Also of modules with buffers that moved in training, such as running statistics, PEFT saves all tensors.

    Args:
        tensors: fully trained parameters, and buffers, by qualified name.
        adapted: the names of the modules with adapters.
        names: what the file says of the parameters; ``None`` if it is of a version that said nothing.
        path: the file, for messages.

    Raises:
        ConfigError: PEFT cannot express what was trained, or the file does not hold all that PEFT saves of it.
    """
    names = _guess_names(tensors, path) if names is None else names
    moved = names.moved or ()
    if names.moved is None and (unclear := _find_statistics(tensors, names)):
        raise ConfigError(
            f"{path} does not say whether {unclear[0]} moved in training, expected one or the other, because PEFT "
            "saves modules with such buffers whole; save the adapters again with this version"
        )
    heads = _find_heads(names.owners, adapted, moved)
    ends = tuple(heads)
    _assert_apart(heads, [*heads, *(name for name in adapted if name.endswith(ends))], adapted, moved)
    if missing := [name for name in (*names.owners, *names.unsaved) if name not in tensors]:
        raise ConfigError(
            f"{path} does not hold {missing[0]}, expected all tensors of the modules that were trained fully or have "
            f"buffers that moved ({', '.join(heads)}) and of those whose names end alike, because PEFT saves them "
            "whole; load the adapters into the model and call save_peft_adapters"
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


def _find_statistics(tensors: Collection[str], names: TrainedNames) -> list[str]:
    """Running statistics outside of the modules that a file holds as trained."""
    return [
        name
        for name in tensors
        if name.rpartition(".")[2] in _STATISTICS and not is_inside(name, names.owners.values())
    ]


def _find_heads(owners: Mapping[str, str], adapted: Collection[str], moved: Collection[str]) -> list[str]:
    """The modules that PEFT saves whole."""
    for name in moved:
        if "." not in name:
            raise ConfigError(
                f"{name} is a buffer of the model itself that has moved in training, PEFT saves those of its "
                "submodules only; move it into a submodule, or save with save()"
            )
    for name, owner in owners.items():
        if not owner and not is_bias_of(name, adapted):
            raise ConfigError(
                f"{name} is a parameter of the model itself and was trained fully, PEFT saves those of its submodules "
                "only; freeze it, move it into a submodule, or save with save()"
            )
    trained = [owner for name, owner in owners.items() if not is_bias_of(name, adapted)]
    return find_outermost([*trained, *(name.rpartition(".")[0] for name in moved)])


def _assert_apart(
    heads: Collection[str], modules: Collection[str], adapted: Collection[str], moved: Collection[str]
) -> None:
    if odd := [module for module in heads if any(inner.endswith(module) for inner in _INNER)]:
        raise ConfigError(
            f"module {odd[0]} is to be saved whole, but PEFT takes all modules whose names end with that, its own "
            f"layers in {next(iter(adapted))} too ({', '.join(_INNER)}); rename the module, or save with save()"
        )
    for module in modules:
        inside = [name for name in adapted if is_inside(name, [module]) or is_inside(module, [name])]
        buffers = [name for name in moved if name.rpartition(".")[0].endswith(module)]
        if inside and buffers:
            raise ConfigError(
                f"module {module} has the buffer {buffers[0]}, which has moved in training, and {inside[0]} has an "
                f"adapter, PEFT has one or the other for a module (it takes every module whose name ends with "
                f"{', '.join(heads)}); keep the module in eval mode while training, exclude the site, or save with "
                "save()"
            )
        if inside:
            raise ConfigError(
                f"module {module} has parameters that were trained fully and {inside[0]} has an adapter, PEFT has one "
                f"or the other for a module (it takes every module whose name ends with {', '.join(heads)}); train "
                "only the bias besides, exclude the site, or save with save()"
            )
