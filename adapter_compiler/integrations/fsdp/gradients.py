"""The gradients of adapters that are whole on every rank, averaged over the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.hooks import RemovableHandle

from adapter_compiler.adapters.parameters.sharded import gather_full, is_sharded
from adapter_compiler.integrations.fsdp.agreement import Group


class GradientAverage:
    """Averages each gradient once for each optimizer step, on request or just before the step.

    A gradient that a backward adds after a request is averaged at the step, together with what was averaged before:
    the mean over the ranks of ḡ + g_r is ḡ plus the mean of g_r.
    """

    def __init__(self, group: Group) -> None:
        """Nothing is averaged yet."""
        self._group = group
        self._averaged: set[int] = set()
        self._has_more = False
        self._watched: dict[int, RemovableHandle] = {}

    def average(self, parameters: Sequence[nn.Parameter]) -> None:
        """Average the gradients over the ranks. Every rank must call it."""
        by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in parameters:
            by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for same in by_kind.values():
            average_gradients(same, self._group)
        self._watch(parameters)
        self._averaged.update(id(parameter) for parameter in parameters)

    def average_before_step(self, parameters: Sequence[nn.Parameter], stepped: Sequence[nn.Parameter]) -> None:
        """Average what has not been averaged since its last step. Every rank must call it.

        Args:
            parameters: all that train: a rank budget reads all gradients before the first optimizer steps.
            stepped: those of them that the optimizer is about to change.
        """
        known = [parameter for parameter in parameters if id(parameter) in self._averaged]
        self.average([parameter for parameter in parameters if id(parameter) not in self._averaged])
        if known and self._has_more_on_any_rank(known[0].device):
            self.average(known)
        self._averaged.difference_update(id(parameter) for parameter in stepped)
        self._has_more = self._has_more and bool(self._averaged)

    def detach(self) -> None:
        """Remove the hooks from the parameters."""
        for handle in self._watched.values():
            handle.remove()
        self._watched.clear()

    def _has_more_on_any_rank(self, device: torch.device) -> bool:
        flag = torch.tensor([float(self._has_more)], device=device)
        dist.all_reduce(flag, group=self._group)
        return bool(flag.item())

    def _watch(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            if id(parameter) not in self._watched:
                self._watched[id(parameter)] = parameter.register_post_accumulate_grad_hook(self._note)

    def _note(self, parameter: torch.Tensor) -> None:
        self._has_more = self._has_more or id(parameter) in self._averaged


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter], group: Group) -> None:
    """Average gradients of one dtype and device by one all-reduce.

    With each gradient goes a flag that says whether this rank has it: where no rank has one, none is made. A rank
    without a gradient counts as one whose gradient is zero. Gradients of 16 bits are summed in float32.
    """
    flags = [float(p.grad is not None) for p in parameters]
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(part.reshape(-1) for part in parts), parts[0].new_tensor(flags)])
    flat = flat.float() if flat.element_size() < 4 else flat
    dist.all_reduce(flat, group=group)
    means = flat[: -len(parameters)].div_(dist.get_world_size(group)).split([p.numel() for p in parameters])
    for parameter, mean, flag in zip(parameters, means, flat[-len(parameters) :].tolist(), strict=True):
        if not flag:
            continue
        if parameter.grad is None:
            parameter.grad = mean.view(parameter.shape).to(parameter.dtype, copy=True)
        else:
            parameter.grad.copy_(mean.view(parameter.shape))


@torch.no_grad()
def measure_norm(gradients: Sequence[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of all elements of gradients together, of which some may be sharded; the same on every rank."""
    norms = []
    for gradient in gradients:
        norms.append(gather_full(torch.linalg.vector_norm(gradient, norm_type)))
    if not norms:
        return torch.tensor(0.0)
    total: torch.Tensor = torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), norm_type)
    return total


@torch.no_grad()
def scale_gradients(gradients: Iterable[torch.Tensor], factor: torch.Tensor) -> None:
    """Multiply gradients, of which some may be sharded, by the same number on every rank."""
    for gradient in gradients:
        local = gradient.to_local() if is_sharded(gradient) else gradient  # type: ignore[attr-defined]
        local.mul_(factor.to(local.device))


def average_losses(result: Any, group: Group) -> Any:
    """The mean over the ranks of what a closure returns, if it is a number; a line search then decides the same."""
    if isinstance(result, (int, float)):
        value = torch.tensor(float(result), dtype=torch.float64)
    elif isinstance(result, torch.Tensor) and result.numel() == 1:
        value = result.detach().clone()
    else:
        return result
    dist.all_reduce(value, group=group)
    value = value / dist.get_world_size(group)
    return float(value) if isinstance(result, (int, float)) else value
