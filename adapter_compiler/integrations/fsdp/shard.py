"""Shard the base of an adapted model block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from adapter_compiler.errors import ConfigError, DistributedError
from adapter_compiler.integrations.fsdp.agreement import gather_on_all, run_on_every_rank
from adapter_compiler.integrations.fsdp.gathering import copy_without_memory, count_local_bytes
from adapter_compiler.integrations.fsdp.sharded_adapters import ShardedAdapters
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.model.dispatch.scope import base_weights
from adapter_compiler.saving.adapters import find_saved_tensors
from adapter_compiler.training.resuming.base_weights import describe_base, describe_tensor
from passes.capture.module_state import is_without_memory
from passes.capture.submodules import find_repeated_modules
from passes.compat import prepare_fsdp
from passes.quantize.packed_weights import find_packed_weights

#: Options of ``fully_shard`` that ``shard`` chooses itself.
_OWN = {"ignored_params": "the adapters", "mesh": "its own argument", "module": "the model"}


def shard(
    adapted: AdaptedModel, mesh: DeviceMesh | None = None, *, blocks: Sequence[str] | None = None, **options: Any
) -> ShardedAdapters:
    """Shard the base of an adapted model in place with ``fully_shard``, block by block.

    Call it on every rank, before the optimizer is made. The model may be on the CPU: each block moves to the device of
    the mesh when it is sharded. The model that was given to ``compile_with_adapters`` keeps the full weights alive
    as long as it exists: delete it, or compile with ``AdapterConfig(inplace=True)``.

    Args:
        adapted: the model, with the same weights on every rank.
        mesh: one-dimensional; by default all ranks.
        blocks: names of the submodules that are gathered as one; by default the blocks that the model repeats.
        options: for ``fully_shard``: ``mp_policy``, ``reshard_after_forward``, ``offload_policy``.

    Raises:
        ConfigError: there is no process group, an argument cannot work, or the model is sharded already.
        DistributedError: the ranks hold different weights.
    """
    mesh = _make_mesh(adapted, mesh)
    names = find_repeated_modules(adapted.module) if blocks is None else list(blocks)
    group = mesh.get_group()
    run_on_every_rank(group, lambda: _check(adapted, names, options))
    _assert_same_weights(adapted, mesh)
    skeleton = copy_without_memory(adapted)
    whole = count_local_bytes(adapted.module)
    ignored = set()
    for name in adapted.adapter_names:  # the parameters of every adapter, or FSDP would take them for its own
        own = adapted.parameters_of_adapter(name).to(mesh.device_type)
        for parameter in own.parameters():
            dist.broadcast(parameter.detach(), group=group, group_src=0)
            ignored.add(parameter)
    with base_weights():  # FSDP reads parameters by their attributes
        for name in names:
            fully_shard(adapted.module.get_submodule(name), mesh=mesh, ignored_params=ignored, **options)
        fully_shard(adapted.module, mesh=mesh, ignored_params=ignored, **options)
    prepare_fsdp(adapted.module, base_weights)
    _shard_inactive(adapted, mesh)
    return ShardedAdapters(adapted, mesh, skeleton, whole)


def _shard_inactive(adapted: AdaptedModel, mesh: DeviceMesh) -> None:
    """Shard the values that inactive adapters keep of fully trained parameters, as these are sharded now."""
    parameters = dict(adapted.module.named_parameters())
    for kept in adapted.adapter_set.inactive.children():
        for name, values in dict(kept.named_buffers()).items():
            path, _, leaf = name.rpartition(".")
            parameter: torch.Tensor | None = parameters.get(name)
            moved = values.to(mesh.device_type)
            if isinstance(parameter, DTensor):
                moved = distribute_tensor(moved, mesh, parameter.placements)
            kept.get_submodule(path)._buffers[leaf] = moved


def _make_mesh(adapted: AdaptedModel, mesh: DeviceMesh | None) -> DeviceMesh:
    if not isinstance(adapted, AdaptedModel):
        raise ConfigError(
            f"shard(adapted=...) is a {type(adapted).__name__}, expected an AdaptedModel; give what "
            "compile_with_adapters returned, without a wrapper"
        )
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError("shard(...) needs a process group, expected one; call torch.distributed.init_process_group")
    if mesh is None:
        device = next(adapted.module.parameters()).device.type
        mesh = init_device_mesh(device, (dist.get_world_size(),))
    if mesh.ndim != 1:
        raise ConfigError(f"shard(mesh=...) has {mesh.ndim} dimensions, expected 1; give mesh['name of one']")
    return mesh


def _check(adapted: AdaptedModel, names: Sequence[str], options: dict[str, Any]) -> None:
    if isinstance(adapted.module, FSDPModule):
        raise ConfigError("shard(adapted=...) is sharded already, expected a model that is whole on each rank")
    if own := sorted(options.keys() & _OWN.keys()):
        raise ConfigError(f"shard({own[0]}=...): expected no such option, as it is {_OWN[own[0]]}; leave it out")
    known = dict(adapted.module.named_modules())
    if odd := [name for name in names if name not in known]:
        raise ConfigError(
            f"shard(blocks=...) names {odd[0]!r}, which is no submodule of {type(adapted.module).__name__}, expected "
            "names as in named_modules(); correct it"
        )
    if packed := list(find_packed_weights(adapted.module)):
        raise ConfigError(
            f"shard(adapted=...): {packed[0]} is quantized, which fully_shard cannot shard, expected floating-point "
            "weights; compile without quantize=, or train with DistributedDataParallel"
        )
    if computed := adapted.find_computed_weights():
        raise ConfigError(
            f"shard(adapted=...): {computed[0]} is computed by a parametrization, expected sites that are parameters; "
            "exclude it from the sites, remove the parametrization first, or train with DistributedDataParallel"
        )
    if is_without_memory(adapted.module):
        raise ConfigError(
            "shard(adapted=...) is on the meta device, expected weights; load them on the CPU, from where each block "
            "moves to the device of the mesh"
        )


def _assert_same_weights(adapted: AdaptedModel, mesh: DeviceMesh) -> None:
    """Raise on every rank if weights differ: shards of different models would make a model that nobody has."""
    group = mesh.get_group()
    trained = {n: t for n, t in find_saved_tensors(adapted).items() if n.startswith("module.")}

    def describe() -> dict[str, str]:
        return describe_base(adapted) | {name: describe_tensor(tensor) for name, tensor in trained.items()}

    found = gather_on_all(group, run_on_every_rank(group, describe))
    for rank, other in enumerate(found):
        if odd := [name for name in {**found[0], **other} if other.get(name) != found[0].get(name)]:
            raise DistributedError(
                f"shard(adapted=...): {odd[0].removeprefix('module.')} is {other.get(odd[0], 'not there')} on rank "
                f"{rank}, expected {found[0].get(odd[0], 'nothing')} as on rank 0 (dtype, shape and checksum); load "
                "the same weights on every rank before compiling, or set the same seed"
            )
