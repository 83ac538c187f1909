"""How the tensors of a saved state lie: their kinds in the header, and which rank they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor import zeros as sharded_zeros

from adapter_compiler.adapters.parameters.sharded import is_sharded
from adapter_compiler.errors import CheckpointError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.saving.primitives.adapter_file import SITES
from adapter_compiler.saving.primitives.file_format import FileFormat
from adapter_compiler.saving.primitives.safetensors_dtypes import DTYPE_NAMES
from adapter_compiler.training.resuming.inactive_adapters import ADAPTERS_FIELD, INACTIVE
from adapter_compiler.training.resuming.state_file import VALUES
from passes.planning.json_schema import Field, is_count, is_object_of, is_text

#: Name of the header's file in the folder.
HEADER_FILE = "sharded_state.safetensors"

#: What the names of the folders with tensors begin with.
DATA = "data-"

#: The parts of a training state that each rank has for itself, and those that all have together.
OWN, SHARED = ("gradients", "others", "random"), ("optimizer", "budget")

_DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


def _is_kind(value: Any) -> bool:
    """Whether a value is [dtype, shape, sharded dimension or ``None``]."""
    if not isinstance(value, list) or len(value) != 3 or value[0] not in _DTYPES:
        return False
    return isinstance(value[1], list) and all(map(is_count, value[1])) and (value[2] is None or is_count(value[2]))


_OBJECT = Field(expected="an object", fits=lambda value: isinstance(value, dict))
_LAYOUT = Field(expected="[dtype, shape, sharded dimension] by tensor", fits=is_object_of(_is_kind))


def _is_rank(value: Any) -> bool:
    return isinstance(value, dict) and value.keys() == {"state", "layout"} and _LAYOUT.fits(value["layout"])


FORMAT = FileFormat(
    kind="sharded training state",
    version=1,
    writer="ShardedAdapters.save_training_state",
    schema={
        "sites": SITES,
        "base": Field(expected="text by weight", fits=is_object_of(is_text)),
        "optimizer": _OBJECT,
        "adapters": ADAPTERS_FIELD,
        "torch": Field(expected="the version of torch", fits=is_text),
        "state": _OBJECT,
        "layout": _LAYOUT,
        "ranks": Field(
            expected="a state and a layout for each rank",
            fits=lambda value: isinstance(value, list) and bool(value) and all(map(_is_rank, value)),
        ),
        "data": Field(
            expected=f"the name of a folder, {DATA}…",
            fits=lambda value: is_text(value) and value.startswith(DATA) and value.removeprefix(DATA).isalnum(),
        ),
    },
)


def split_by_owner(
    tensors: Mapping[str, torch.Tensor], adapted: AdaptedModel
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors that all ranks hold together, and those that each rank has for itself.

    The latter are accumulated gradients, states of random generators and of other objects, and buffers of the model.
    """
    prefixes = (VALUES, *(f"{INACTIVE}{name}." for name in adapted.adapter_names))
    buffers = {f"{prefix}module.{name}" for prefix in prefixes for name, _ in adapted.module.named_buffers()}
    own = {
        name: tensor
        for name, tensor in tensors.items()
        if not is_sharded(tensor) and (name in buffers or name.startswith(tuple(f"{part}." for part in OWN)))
    }
    return {name: tensor for name, tensor in tensors.items() if name not in own}, own


def describe_layout(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[Any]]:
    """[dtype, shape, sharded dimension] by name."""
    return {name: [DTYPE_NAMES[t.dtype], list(t.shape), _find_dimension(t)] for name, t in tensors.items()}


def allocate(layout: Mapping[str, list[Any]], mesh: DeviceMesh | None) -> dict[str, torch.Tensor]:
    """Tensors of zeros for a layout; sharded on the ranks of the mesh if there is one, else whole."""
    made: dict[str, torch.Tensor] = {}
    for name, (dtype, shape, dimension) in layout.items():
        if dimension is None or mesh is None:
            made[name] = torch.zeros(shape, dtype=_DTYPES[dtype])
        else:
            made[name] = sharded_zeros(*shape, dtype=_DTYPES[dtype], device_mesh=mesh, placements=[Shard(dimension)])
    return made


def name_of_rank(rank: int, name: str) -> str:
    """The name under which a tensor that rank ``rank`` has for itself is saved."""
    return f"rank{rank}.{name}"


def drop_empty(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that have elements; the header says all that there is to know of the others."""
    return {name: tensor for name, tensor in tensors.items() if tensor.numel()}


def find_mesh(adapted: AdaptedModel) -> DeviceMesh | None:
    """The ranks over which a model is sharded, or ``None`` if it is whole."""
    found = next(_iterate_sharded(adapted), None)
    return None if found is None else found.device_mesh


def _iterate_sharded(adapted: AdaptedModel) -> Iterator[DTensor]:
    return (p for p in adapted.module.parameters() if isinstance(p, DTensor))


def _find_dimension(tensor: torch.Tensor) -> int | None:
    """The dimension by which a tensor is sharded over a mesh of one dimension, or ``None`` if it is whole."""
    if not isinstance(tensor, DTensor):
        return None
    placement = tensor.placements[0]
    if len(tensor.placements) != 1 or not isinstance(placement, Shard):
        raise CheckpointError(
            f"a tensor of shape {tuple(tensor.shape)} has the placements {tensor.placements}, expected one Shard(...); "
            "shard the model with shard(adapted)"
        )
    return placement.dim
