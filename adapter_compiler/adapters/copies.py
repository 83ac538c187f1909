"""Copy a user's model; its weights are shared, cloned or replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from adapter_compiler.errors import AdapterCompilerError
from passes.quantize.packed_weights import PackedWeight


def copy_module(
    module: nn.Module,
    make_parameter: Callable[[str, nn.Parameter], nn.Parameter],
    shared: Mapping[int, object] | None = None,
) -> nn.Module:
    """A copy of ``module`` with its class, attributes, hooks and modes, and its own buffers.

    Args:
        module: the model to copy; it is not changed.
        make_parameter: called with the first qualified name and the Parameter of each parameter; returns the copy's.
        shared: objects that the copy uses in place of others, by the id of the replaced object.

    Raises:
        AdapterCompilerError: an attribute cannot be copied, or a lazy parameter has no shape yet.
    """
    assert_not_lazy(module)
    memo: dict[int, Any] = {
        **(shared or {}),
        **{id(parameter): make_parameter(name, parameter) for name, parameter in module.named_parameters()},
    }
    detach_computed_attributes(module, memo)
    # The memo refers to the originals by id only, so they must exist until deepcopy returns: ``module`` holds them.
    try:
        with torch.no_grad():  # so that a tensor that TorchScript copies itself stays a leaf
            return copy.deepcopy(module, memo)
    except Exception as error:
        raise AdapterCompilerError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}); remove the attribute that "
            "cannot, give the class a __deepcopy__, or adapt the model itself with AdapterConfig(inplace=True)"
        ) from error


def detach_computed_attributes(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy detach the non-leaf tensors that a call left in attributes; deepcopy would refuse them.

    Args:
        module: the model to be copied.
        memo: deepcopy's memo; the detached clones are added to it.
    """
    for child in module.modules():
        for value in child.__dict__.values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()


def assert_not_lazy(module: nn.Module) -> None:
    """Raise :class:`AdapterCompilerError` if a parameter is lazy, that is, gets its shape in the first call."""
    for name, parameter in module.named_parameters():
        if isinstance(parameter, UninitializedParameter):
            raise AdapterCompilerError(
                f"parameter {name} is lazy and has no shape yet, expected a tensor; call the model once on an example"
            )


def share_parameter(parameter: nn.Parameter) -> nn.Parameter:
    """A frozen Parameter over the same storage."""
    shared = nn.Parameter(parameter.detach(), requires_grad=False)
    shared.__dict__.update(parameter.__dict__)
    return shared


def share_unpacked(parameter: nn.Parameter) -> nn.Parameter:
    """A frozen Parameter over the same storage; a quantized one is unpacked to full precision instead."""
    if not isinstance(parameter, PackedWeight):
        return share_parameter(parameter)
    return replace_parameter(parameter, parameter.unpack(), requires_grad=False)


def clone_parameter(parameter: nn.Parameter, *, requires_grad: bool) -> nn.Parameter:
    """A Parameter with its own storage and the same values."""
    return replace_parameter(parameter, parameter.detach().clone(), requires_grad=requires_grad)


def replace_parameter(parameter: nn.Parameter, values: torch.Tensor, *, requires_grad: bool) -> nn.Parameter:
    """A Parameter with these values and the Python attributes of ``parameter``."""
    fresh = nn.Parameter(values, requires_grad=requires_grad and values.is_floating_point())
    fresh.__dict__.update({key: value for key, value in parameter.__dict__.items() if key != "_is_param"})
    return fresh


def replace_at(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a Parameter under one qualified name; further names of a tied parameter keep the old one."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter
