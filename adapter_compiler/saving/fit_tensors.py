"""Compare tensors of a file with the places that they are for, and cast them where no value changes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from adapter_compiler.errors import CheckpointError
from passes.planning.json_schema import show

#: Shape and dtype of a tensor.
Kind = tuple[tuple[int, ...], torch.dtype]


def fit_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, Kind]
) -> dict[str, torch.Tensor]:
    """The tensors of a file in the dtypes of the places that they are for.

    Raises:
        CheckpointError: there are others, or a shape is another, or a dtype that cannot hold the values.
    """
    if odd := sorted(targets.keys() ^ tensors.keys()):
        raise CheckpointError(
            f"{path}: tensor {show(odd[0])[1:-1]} is on one side only; compile with the same trainable="
        )
    for name, (shape, _) in targets.items():
        if shape != tuple(tensors[name].shape):
            raise CheckpointError(
                f"{path}: {name} has shape {tuple(tensors[name].shape)}, this model expects {shape}; compile the model "
                "that was trained, with the same rank"
            )
    return {name: cast_exactly(path, name, tensors[name], dtype) for name, (_, dtype) in targets.items()}


def assert_same_dtypes(path: Path, tensors: Mapping[str, torch.Tensor], targets: Mapping[str, Kind]) -> None:
    """Raise :class:`CheckpointError` if a tensor of a file has another dtype than the place that it is for."""
    for name, tensor in tensors.items():
        if name in targets and tensor.dtype != targets[name][1]:
            raise CheckpointError(
                f"{path}: {name} is {tensor.dtype}, this model has {targets[name][1]}, expected the same, as training "
                "goes on bit for bit; compile the model in that dtype"
            )


def cast_exactly(path: Path, name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a file in another dtype, in which each value is the same.

    Raises:
        CheckpointError: a value would be rounded or become inf.
    """
    if tensor.dtype == dtype:
        return tensor
    if tensor.is_complex() != dtype.is_complex:
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, this model has {dtype}, expected the same kind; save it again"
        )
    cast = tensor.to(dtype)
    # float64 holds the values of all other floats, those of 8 bits as well, which cannot be compared by themselves.
    back, values = (t.double() if t.is_floating_point() else t for t in (cast.to(tensor.dtype), tensor))
    changed = ((back != values) & ~(back.isnan() & values.isnan())).reshape(-1)
    if bool(changed.any()):
        example = tensor.reshape(-1)[changed][0].item()
        raise CheckpointError(
            f"{path}: {name} is {tensor.dtype}, this model has {dtype}, which does not hold {int(changed.sum())} of "
            f"its {tensor.numel()} values ({example!r} would become {cast.reshape(-1)[changed][0].item()!r}), expected "
            f"a dtype that does; compile a model of {tensor.dtype}, or with AdapterConfig(dtype={tensor.dtype})"
        )
    return cast
