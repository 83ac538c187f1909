"""The same checksums of frozen weights on any number of ranks."""

from __future__ import annotations

import torch
from torch.distributed.tensor import DTensor, Shard

from adapter_compiler.adapters.parameters.checksum import format_checksum, sum_part
from adapter_compiler.integrations.fsdp.agreement import Group, sum_integers
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.training.resuming.base_weights import describe_base, find_frozen


def describe_sharded_base(adapted: AdaptedModel, group: Group) -> dict[str, str]:
    """What :func:`~adapter_compiler.training.resuming.base_weights.describe_base` gave before the weights were sharded.

    Every rank must call it. Each reads its own shards; weights that are not sharded by rows are left out.
    """
    found = describe_base(adapted)
    frozen = {name: p for name, p in find_frozen(adapted).items() if isinstance(p, DTensor) and _is_by_rows(p)}
    parts = [value for parameter in frozen.values() for value in _sum_shard(parameter)]
    device = next((p.to_local().device for p in frozen.values()), torch.device("cpu"))
    totals = sum_integers(group, parts, device)
    for number, (name, parameter) in enumerate(frozen.items()):
        checksum = format_checksum(*totals[2 * number : 2 * number + 2])
        found[name] = f"{parameter.dtype} {list(parameter.shape)} {checksum}".removeprefix("torch.")
    return found


def _is_by_rows(parameter: DTensor) -> bool:
    placements = parameter.placements
    return len(placements) == 1 and isinstance(placements[0], Shard) and placements[0].dim == 0


def _sum_shard(parameter: DTensor) -> tuple[int, int]:
    """The sums of checksums over the words of this rank's rows, which are a chunk as ``torch.chunk`` cuts them."""
    local, mesh = parameter.to_local(), parameter.device_mesh
    rows = -(-parameter.shape[0] // mesh.size())
    before = min(rows * mesh.get_local_rank(), parameter.shape[0])
    width = parameter.shape[1:].numel()
    return sum_part(local, before * width * local.element_size())
