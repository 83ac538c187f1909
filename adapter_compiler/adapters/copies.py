"""Copies of a user's model that share, clone or replace its weights."""

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
        module: what to copy; it is not changed.
        make_parameter: gives the copy's parameter for each one, by its first qualified name.
        shared: further objects for the copy, by the id of what they stand for.

    Raises:
        AdapterCompilerError: an attribute cannot be copied, or a lazy parameter has no shape yet.
    """
    assert_not_lazy(module)
    memo: dict[int, Any] = {
        **(shared or {}),
        **{id(parameter): make_parameter(name, parameter) for name, parameter in module.named_parameters()},
    }
    detach_computed_attributes(module, memo)
    # deepcopy keeps what the memo holds alive only by id, so the originals must outlive the call: they do.
    try:
        with torch.no_grad():  # so that what TorchScript copies by itself stays a leaf
            return copy.deepcopy(module, memo)
    except Exception as error:
        raise AdapterCompilerError(
            f"{type(module).__name__} cannot be copied ({type(error).__name__}: {error}); remove the attribute that "
            "cannot, give the class a __deepcopy__, or adapt the model itself with AdapterConfig(inplace=True)"
        ) from error


def detach_computed_attributes(module: nn.Module, memo: dict[int, Any]) -> None:
    """Let a deep copy take the values of tensors that a call left behind in attributes, without their history."""
    for child in module.modules():
        for value in child.__dict__.values():
            if isinstance(value, torch.Tensor) and not value.is_leaf:
                memo[id(value)] = value.detach().clone()


def assert_not_lazy(module: nn.Module) -> None:
    """Raise :class:`AdapterCompilerError` for a parameter that gets its shape at the first call."""
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
    """A frozen Parameter over the same storage; of a quantized one, over its values in full precision."""
    if not isinstance(parameter, PackedWeight):
        return share_parameter(parameter)
    return replace_parameter(parameter, parameter.unpack(), requires_grad=False)


def clone_parameter(parameter: nn.Parameter, *, requires_grad: bool) -> nn.Parameter:
    """A Parameter with its own storage and the same values."""
    return replace_parameter(parameter, parameter.detach().clone(), requires_grad=requires_grad)


def replace_parameter(parameter: nn.Parameter, values: torch.Tensor, *, requires_grad: bool) -> nn.Parameter:
    """A Parameter with these values and the attributes of ``parameter``."""
    fresh = nn.Parameter(values, requires_grad=requires_grad and values.is_floating_point())
    fresh.__dict__.update({key: value for key, value in parameter.__dict__.items() if key != "_is_param"})
    return fresh


def replace_at(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a Parameter at a qualified name, and at no other name of the one it takes the place of."""
    owner, _, leaf = name.rpartition(".")
    module.get_submodule(owner)._parameters[leaf] = parameter
