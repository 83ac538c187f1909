"""What was trained fully beside adapters, as PEFT saves it: whole modules, and biases of adapted modules."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from adapter_compiler.errors import ConfigError


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
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    names = [name for name, tensor in state.items() if id(tensor) in trained]
    biases = {name: state[name] for name in names if _is_bias_of(name, adapted)}
    heads = _find_outermost(name.rpartition(".")[0] for name in names if name not in biases)
    modules = [name for name, _ in model.named_modules(remove_duplicate=False) if name.endswith(tuple(heads))]
    _assert_apart(heads, modules if heads else [], adapted)
    prefixes = tuple(f"{name}." for name in modules)
    tensors = {name: tensor for name, tensor in state.items() if heads and name.startswith(prefixes)}
    return TrainedTensors(modules=tuple(heads), tensors=tensors, biases=biases)


def group_trained(tensors: Mapping[str, torch.Tensor], adapted: Collection[str]) -> TrainedTensors:
    """What a file of adapters holds besides, without the model's code.

    Buffers that moved in training (running statistics) have no place in PEFT's format and are left out, unless they
    belong to a module whose parameters were trained fully.

    Raises:
        ConfigError: PEFT cannot express what was trained.
    """
    biases = {name: tensor for name, tensor in tensors.items() if _is_bias_of(name, adapted)}
    owners = {name: name.rpartition(".")[0] for name in tensors if name not in biases}
    heads = _find_outermost(owner for name, owner in owners.items() if name.rpartition(".")[2] in ("weight", "bias"))
    _assert_apart(heads, heads, adapted)
    kept = {name: tensors[name] for name, owner in owners.items() if _is_inside(owner, heads)}
    return TrainedTensors(modules=tuple(heads), tensors=kept, biases=biases)


def _is_bias_of(name: str, adapted: Collection[str]) -> bool:
    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and owner in adapted


def _find_outermost(names: Iterable[str]) -> list[str]:
    """The modules that are in none of the others."""
    found = sorted(set(names))
    return [name for name in found if not _is_inside(name.rpartition(".")[0], found)]


def _is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these or in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules if module)


def _assert_apart(heads: Collection[str], modules: Collection[str], adapted: Collection[str]) -> None:
    if "" in heads:
        raise ConfigError(
            "a parameter of the model itself was trained fully, PEFT saves those of its submodules only; "
            "expected none; save with save()"
        )
    for module in modules:
        inside = [name for name in adapted if _is_inside(name, [module]) or _is_inside(module, [name])]
        if inside:
            raise ConfigError(
                f"module {module} has parameters that were trained fully and {inside[0]} has an adapter, PEFT has one "
                f"or the other for a module (it takes every module whose name ends with {', '.join(heads)}); train "
                "only the bias besides, exclude the site, or save with save()"
            )
