"""FSDP2 around an adapted model: the base is sharded, the adapters are whole on every rank.

``shard(adapted)`` takes the place of ``fully_shard``; the optimizer and the rank budget are made after it as ever.
Adapters are small, and what scores and cuts them needs them whole. Their gradients are summed over the ranks in one
all-reduce before each optimizer step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from adapter_compiler.adapters.copies import copy_module, replace_parameter
from adapter_compiler.errors import AdapterCompilerError, ConfigError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.dispatch.attach import detach_adapters, share_slots
from adapter_compiler.model.dispatch.scope import base_weights
from passes.adapt.fold_adapters import merge_weight
from passes.capture.submodules import find_repeated_modules


def shard(
    adapted: AdaptedModel, mesh: DeviceMesh | None = None, *, blocks: Sequence[str] | None = None, **options: Any
) -> ShardedAdapters:
    """Shard the base of an adapted model in place with ``fully_shard``, block by block.

    Call it before the optimizer is made, on every rank, with the same weights on each.

    Args:
        adapted: the model, on the device of this rank.
        mesh: one-dimensional; by default all ranks.
        blocks: names of the submodules that are gathered as one; by default the blocks that the model repeats.
        options: for ``fully_shard``: ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Raises:
        ConfigError: there is no process group, the mesh has several dimensions, or the model is sharded already.
    """
    mesh = _check(adapted, mesh)
    skeleton = _copy_without_memory(adapted)
    whole = _count_local_bytes(adapted.module)
    for parameter in adapted.adapters.parameters():
        dist.broadcast(parameter.detach(), group=mesh.get_group(), group_src=0)
    # The parameters of every adapter, or FSDP would take them for its own.
    ignored = {p for name in adapted.adapter_names for p in adapted.parameters_of_adapter(name).parameters()}
    names = find_repeated_modules(adapted.module) if blocks is None else list(blocks)
    with base_weights():  # FSDP reads parameters by their attributes, and again when it is first called
        for name in names:
            fully_shard(adapted.module.get_submodule(name), mesh=mesh, ignored_params=ignored, **options)
        fully_shard(adapted.module, mesh=mesh, ignored_params=ignored, **options)
        _initialize(adapted.module)
    return ShardedAdapters(adapted, mesh, skeleton, whole)


class ShardedAdapters:
    """An adapted model whose base is sharded. Train ``adapted`` as ever.

    Attributes:
        adapted: the model.
        mesh: the ranks.
        bytes_whole: memory of the base's parameters before.
        bytes_here: what this rank keeps of them.
    """

    def __init__(self, adapted: AdaptedModel, mesh: DeviceMesh, skeleton: nn.Module, bytes_whole: int) -> None:
        """Hook the sum of gradients to optimizer steps; :func:`shard` makes this."""
        self.adapted = adapted
        self.mesh = mesh
        self.bytes_whole, self.bytes_here = bytes_whole, _count_local_bytes(adapted.module)
        self._skeleton = skeleton
        self._is_synchronized = False
        self._handle = register_optimizer_step_pre_hook(self._before_step)

    def detach(self) -> None:
        """Take the hook off optimizer steps."""
        self._handle.remove()

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Average the adapters' gradients over the ranks; each optimizer step does it if it has not been done since.

        Call it, on every rank, where something looks at gradients before the step: ``clip_grad_norm_``, a GradScaler.
        """
        by_kind: dict[tuple[torch.dtype, torch.device], list[nn.Parameter]] = {}
        for parameter in self.adapted.adapters.parameters():
            if parameter.requires_grad:
                by_kind.setdefault((parameter.dtype, parameter.device), []).append(parameter)
        for parameters in by_kind.values():
            _average(parameters, self.mesh)
        self._is_synchronized = True

    def save(self, directory: str | Path) -> Path | None:
        """Write the active adapter as :meth:`AdaptedModel.save` does, on rank 0 of the mesh; ``None`` elsewhere.

        Every rank must call it.

        Raises:
            ConfigError: parameters of the base are trained fully, and so sharded.
        """
        if trained := [name for name, p in self.adapted.module.named_parameters() if p.requires_grad]:
            raise ConfigError(
                f"{trained[0]} is trained fully and sharded, expected adapters only; fold(gather='all') and save that, "
                "or save the state by torch.distributed.checkpoint"
            )
        path = self.adapted.save(directory) if self.mesh.get_local_rank() == 0 else None
        dist.barrier(group=self.mesh.get_group())
        return path

    @torch.no_grad()
    def fold(self, *, gather: str = "rank0") -> nn.Module | None:
        """The user's own model with every ΔW merged, as :meth:`AdaptedModel.fold`, gathered weight by weight.

        Every rank must call it.

        Args:
            gather: ``"rank0"`` gives it to rank 0 of the mesh, on the CPU, and ``None`` to the others; ``"all"`` gives
                it to every rank.

        Raises:
            ConfigError: ``gather`` is neither.
        """
        if gather not in ("rank0", "all"):
            raise ConfigError(f"fold(gather={gather!r}): expected 'rank0' or 'all'; for example gather='rank0'")
        is_mine = gather == "all" or self.mesh.get_local_rank() == 0
        merged = copy.deepcopy(self._skeleton) if is_mine else None
        planned = self.adapted.plan.live.by_weight
        parameters = dict(merged.named_parameters()) if merged is not None else {}
        filled: dict[str, nn.Parameter] = {}
        for name, parameter in self.adapted.module.named_parameters():
            weight = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter.detach()
            if merged is None:
                continue
            weight = weight.to("cpu", copy=True)
            for adapter in planned.get(name, ()):
                own = {key: p.cpu() for key, p in self.adapted.adapters.parameters_of(adapter).items()}
                weight = merge_weight(weight, adapter, own).weight
            filled[name] = replace_parameter(parameters[name], weight, requires_grad=parameters[name].requires_grad)
        if merged is not None:
            _fill(merged, filled, self.adapted.module)
        return merged

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        mine = {id(parameter) for parameter in self.adapted.adapters.parameters()}
        if not any(id(p) in mine for group in optimizer.param_groups for p in group["params"]):
            return
        if not self._is_synchronized:
            self.sync_gradients()
        self._is_synchronized = False


def _average(parameters: Sequence[nn.Parameter], mesh: DeviceMesh) -> None:
    """One all-reduce of all gradients, with a flag for each that says whether any rank has it."""
    flags = torch.tensor([float(p.grad is not None) for p in parameters], dtype=parameters[0].dtype)
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(part.reshape(-1) for part in parts), flags.to(parameters[0].device)])
    dist.all_reduce(flat, group=mesh.get_group())
    sums = flat[: -len(parameters)].div_(mesh.size()).split([p.numel() for p in parameters])
    for parameter, total, flag in zip(parameters, sums, flat[-len(parameters) :].tolist(), strict=True):
        if not flag:
            continue
        if parameter.grad is None:
            parameter.grad = total.view(parameter.shape).clone()
        else:
            parameter.grad.copy_(total.view(parameter.shape))


def _check(adapted: AdaptedModel, mesh: DeviceMesh | None) -> DeviceMesh:
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("shard(...) needs a process group, expected one; call torch.distributed.init_process_group")
    if isinstance(adapted.module, FSDPModule):
        raise ConfigError("shard(adapted=...) is sharded already, expected a model that is whole on each rank")
    if mesh is None:
        device = next(adapted.module.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ConfigError(f"shard(mesh=...) has {mesh.ndim} dimensions, expected 1; give mesh['name of one']")
    return mesh


def _copy_without_memory(adapted: AdaptedModel) -> nn.Module:
    """The user's module without adapters and values, with the flags of the model that was handed in."""
    flags = adapted.find_gradient_flags()

    def empty(name: str, parameter: nn.Parameter) -> nn.Parameter:
        return replace_parameter(parameter, parameter.detach().to("meta"), requires_grad=flags.get(name, True))

    memo: dict[int, object] = {}
    share_slots(adapted.module, memo)
    copied = copy_module(adapted.module, empty, memo)
    detach_adapters(copied)
    return copied


def _fill(merged: nn.Module, parameters: dict[str, nn.Parameter], live: nn.Module) -> None:
    """Put parameters at every name of those that are there, and the buffers as they are now."""
    first = {id(parameter): name for name, parameter in merged.named_parameters()}
    for module in merged.modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in first:
                module._parameters[leaf] = parameters[first[id(parameter)]]
    buffers = dict(live.named_buffers())
    for name, buffer in merged.named_buffers():
        buffer.copy_(buffers[name])
    for ours, theirs in zip(merged.modules(), live.modules(), strict=True):
        ours.training = theirs.training


def _count_local_bytes(module: nn.Module) -> int:
    tensors = (p.to_local() if isinstance(p, DTensor) else p for p in module.parameters())
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _initialize(module: nn.Module) -> None:
    """Let FSDP look at the parameters now; at the first call it would read W + ΔW."""
    state = getattr(module, "_get_fsdp_state", lambda: None)()
    initialize = getattr(state, "_lazy_init", None)
    if initialize is None:
        raise AdapterCompilerError(
            f"torch {torch.__version__} initializes fully_shard in another way, expected "
            "_get_fsdp_state()._lazy_init(); use a version that adapter-compiler was tested with"
        )
    initialize()
