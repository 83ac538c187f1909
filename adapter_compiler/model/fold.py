"""The user's own model with W + ΔW in its weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from adapter_compiler.adapters.copies import clone_parameter, copy_module, replace_parameter
from adapter_compiler.config.progress import progress, tell
from adapter_compiler.model.dispatch.attach import detach_adapters, find_slots, share_slots
from passes.adapt.fold_adapters import merge_weight


def fold_module(module: nn.Module, gradient_flags: Mapping[str, bool]) -> tuple[nn.Module, dict[str, float]]:
    """A copy of a module with every ΔW merged into its weight; sums are computed in float64 and cast once.

    Args:
        module: the user's module, with adapters attached.
        gradient_flags: which parameters require grad in the copy, by first name; others keep their flag.

    Returns:
        The copy, which shares no memory with the module, and the largest rounding error at each site, by its name.
    """
    slots = find_slots(module)
    errors: dict[str, float] = {}

    def merge(name: str, parameter: nn.Parameter) -> nn.Parameter:
        slot = slots.get(name)
        first_name = name if slot is None else slot.weight
        flag = gradient_flags.get(first_name, parameter.requires_grad)
        if slot is None:
            return clone_parameter(parameter, requires_grad=flag)
        weight: torch.Tensor = parameter
        tell(name, len(errors), len(slots))
        for adapter in slot.adapters:
            merged = merge_weight(weight, adapter.planned, adapter.bind().parameters)
            weight, errors[adapter.planned.site.name] = merged.weight, merged.rounding_error
        return replace_parameter(parameter, weight, requires_grad=flag)

    with progress("fold"):
        return copy_without_adapters(module, merge), errors


def copy_without_adapters(module: nn.Module, make_parameter: Callable[[str, nn.Parameter], nn.Parameter]) -> nn.Module:
    """A copy of a module with the user's own classes again, and a parameter of the caller's for each name."""
    memo: dict[int, object] = {}
    share_slots(module, memo)
    copied = copy_module(module, make_parameter, memo)
    detach_adapters(copied)
    return copied
