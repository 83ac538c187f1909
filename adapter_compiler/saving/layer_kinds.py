"""What PEFT's files depend on in a model: kinds of modules with adapters, and which modules were trained fully."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn

#: ``nn.Linear`` and transformers' ``Conv1D``.
LINEAR = "linear"

#: The same, but it is not known which of the two, so that the layout of the weight is not known either.
LINEAR_OR_CONV1D = "linear or Conv1D"

EMBEDDING = "embedding"

#: Convolutions by the dimensions of their kernels; only those that PEFT's two convolutions in a row can express.
CONVOLUTIONS: Mapping[int, str] = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}

#: ``in_proj_weight`` or ``out_proj.weight`` of an ``nn.MultiheadAttention``.
ATTENTION = "nn.MultiheadAttention"

#: A parameter that is no ``weight`` of a module of these kinds.
PARAMETER = "parameter"

#: Modules without a forward, which PEFT's ``modules_to_save`` does not take.
_CONTAINERS = (nn.ParameterList, nn.ParameterDict)


def find_layer_kind(model: nn.Module, weight: str) -> str:
    """The kind of the module that a weight belongs to; for a kind that is not listed here the name of its class."""
    path, _, leaf = weight.rpartition(".")
    owner = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return ATTENTION
    if leaf != "weight":
        return PARAMETER
    if isinstance(owner, nn.Embedding):
        return EMBEDDING
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _find_convolution(owner)
    is_linear = isinstance(owner, nn.Linear) or any(cls.__name__ == "Conv1D" for cls in type(owner).__mro__)
    return LINEAR if is_linear else type(owner).__name__


def _find_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    """PEFT's first convolution has the layer's kernel, stride and padding, but no groups and no dilation."""
    kind = CONVOLUTIONS[layer.weight.dim()]
    if layer.groups > 1:
        return f"{kind} with {layer.groups} groups"
    if any(step > 1 for step in layer.dilation):
        return f"{kind} with dilation {layer.dilation}"
    return kind if layer.padding_mode == "zeros" else f"{kind} with padding_mode {layer.padding_mode!r}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedNames:
    """What a file of adapters says of the parameters that were trained fully.

    Attributes:
        owners: by name of the parameter, all names of a tied one included, the module that computes with it.
        unsaved: other tensors of these modules, of those with buffers that moved, and of modules of similar names,
            which the file does not hold.
        moved: the buffers whose values are others than those of the base; ``None`` if the file does not say.
    """

    owners: Mapping[str, str]
    unsaved: tuple[str, ...] = ()
    moved: tuple[str, ...] | None = None

    def describe(self) -> dict[str, Any]:
        """What the header of a file says of them."""
        moved = {} if self.moved is None else {"moved": list(self.moved)}
        return {"trained": dict(self.owners), "unsaved": list(self.unsaved), **moved}


def find_trained_names(
    model: nn.Module, adapted: Collection[str], saved: Collection[str], moved: Iterable[str]
) -> TrainedNames:
    """What is trained in a model.

    Args:
        model: the user's module.
        adapted: the names of the modules with adapters.
        saved: the names of the tensors of the model that the file holds.
        moved: those of the buffers whose values are others than those of the base.
    """
    owners, moved = find_owners(model), tuple(moved)
    trained = [owner for name, owner in owners.items() if not is_bias_of(name, adapted)]
    heads = find_outermost([*trained, *(name.rpartition(".")[0] for name in moved)])
    prefixes = tuple(f"{name}." for name in find_modules_like(model, heads))
    unsaved = [name for name in model.state_dict() if name.startswith(prefixes) and name not in saved]
    return TrainedNames(owners=owners, unsaved=tuple(unsaved), moved=moved)


def find_owners(model: nn.Module) -> dict[str, str]:
    """The module of each parameter that requires gradients; of one in a list or dict of parameters what holds that."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    state = model.state_dict(keep_vars=True)
    return {name: _find_owner(model, name) for name, tensor in state.items() if id(tensor) in trained}


def find_modules_like(model: nn.Module, heads: Iterable[str]) -> list[str]:
    """The modules that PEFT takes for these: all whose names end with one of them; ``""`` stands for none."""
    ends = tuple(head for head in heads if head)
    return [name for name, _ in model.named_modules(remove_duplicate=False) if ends and name.endswith(ends)]


def find_outermost(names: Iterable[str]) -> list[str]:
    """The modules that are in none of the others."""
    found = sorted(set(names))
    return [name for name in found if not is_inside(name.rpartition(".")[0], found)]


def is_inside(name: str, modules: Iterable[str]) -> bool:
    """Whether a module is one of these or in one of them."""
    return any(name == module or name.startswith(f"{module}.") for module in modules if module)


def is_bias_of(name: str, adapted: Collection[str]) -> bool:
    """Whether a parameter is the bias of a module with an adapter, for which PEFT has a place of its own."""
    owner, _, leaf = name.rpartition(".")
    return leaf == "bias" and owner in adapted


def _find_owner(model: nn.Module, name: str) -> str:
    owner = name.rpartition(".")[0]
    while isinstance(model.get_submodule(owner), _CONTAINERS):
        owner = owner.rpartition(".")[0]
    return owner
