"""Gather the sharded base weight by weight into the user's own model, with every ΔW merged."""

from __future__ import annotations

import copy

import torch
from torch import nn

from adapter_compiler.adapters.copies import replace_parameter
from adapter_compiler.adapters.parameters.sharded import gather_full, is_sharded
from adapter_compiler.adapters.reports import FoldReport
from adapter_compiler.config.progress import progress, tell
from adapter_compiler.integrations.fsdp.agreement import Group, run_on_every_rank
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.fold import copy_without_adapters
from passes.adapt.fold_adapters import merge_weight


def copy_without_memory(adapted: AdaptedModel) -> nn.Module:
    """The user's module without adapters and values, with the flags of the model that was handed in."""
    flags = adapted.find_gradient_flags()

    def empty(name: str, parameter: nn.Parameter) -> nn.Parameter:
        return replace_parameter(parameter, parameter.detach().to("meta"), requires_grad=flags.get(name, True))

    return copy_without_adapters(adapted.module, empty)


def count_local_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters that this rank holds."""
    tensors = (p.to_local() if is_sharded(p) else p for p in module.parameters())  # type: ignore[attr-defined]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@torch.no_grad()
def gather_folded(adapted: AdaptedModel, skeleton: nn.Module, group: Group, *, is_mine: bool) -> nn.Module | None:
    """The user's own model with every ΔW merged, on the CPU; every rank must call it.

    Args:
        adapted: the model, whose base is sharded.
        skeleton: what :func:`copy_without_memory` gave before it was.
        group: the ranks.
        is_mine: whether this rank gets it; the others get ``None``.
    """
    with progress("gather and fold"):
        return _gather_folded(adapted, skeleton, group, is_mine=is_mine)


def _gather_folded(adapted: AdaptedModel, skeleton: nn.Module, group: Group, *, is_mine: bool) -> nn.Module | None:
    merger = _Merger(adapted, skeleton) if is_mine else None
    failure: Exception | None = None
    for name, parameter in adapted.module.named_parameters():
        tell(name)
        weight = gather_full(parameter.detach())  # also after a failure, as other ranks wait for this one
        if merger is None or failure is not None:
            continue
        try:
            merger.add(name, weight)
        except Exception as error:
            failure = error

    def finish() -> nn.Module | None:
        if failure is not None:
            raise failure
        return None if merger is None else merger.finish()

    return run_on_every_rank(group, finish)


class _Merger:
    """Fills a copy of the user's model with merged weights."""

    def __init__(self, adapted: AdaptedModel, skeleton: nn.Module) -> None:
        self._adapted = adapted
        self._merged = copy.deepcopy(skeleton)
        self._parameters = dict(self._merged.named_parameters())
        self._planned = adapted.plan.live.by_weight
        self._filled: dict[str, nn.Parameter] = {}
        self._errors: dict[str, float] = {}

    def add(self, name: str, weight: torch.Tensor) -> None:
        """Merge the adapters of one weight into it."""
        weight = weight.to("cpu", copy=True)
        for adapter in self._planned.get(name, ()):
            own = {key: p.detach().cpu() for key, p in self._adapted.adapters.parameters_of(adapter).items()}
            found = merge_weight(weight, adapter, own)
            weight, self._errors[adapter.site.name] = found.weight, found.rounding_error
        empty = self._parameters[name]
        self._filled[name] = replace_parameter(empty, weight, requires_grad=empty.requires_grad)

    def finish(self) -> nn.Module:
        """Put the parameters in, at every name of those that are tied, and the buffers and modes as they are now."""
        first = {id(parameter): name for name, parameter in self._merged.named_parameters()}
        for module in self._merged.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None and id(parameter) in first:
                    module._parameters[leaf] = self._filled[first[id(parameter)]]
        self._merged.to("cpu")
        buffers = dict(self._adapted.module.named_buffers())
        for name, buffer in self._merged.named_buffers():
            buffer.copy_(buffers[name])
        for ours, theirs in zip(self._merged.modules(), self._adapted.module.modules(), strict=True):
            ours.training = theirs.training
        self._adapted.fold_report = FoldReport(rounding_error=self._errors, quantization_error={})
        return self._merged
