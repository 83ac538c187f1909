"""Adapters for onnxruntime: ``.onnx_adapter``, the inputs of a file that was exported with ``adapters="runtime"``.

Its rule: ΔWᵀ = A B with A [in, r] and B [r, out], so λ and the scale stand in B, and each weight has its own rank. An
input that the adapter says nothing about gets what it is without an adapter: rank 0, or the base model's value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.updates import Abilities, WeightUpdate
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.onnx_files.adapter_tensors import input_names, read_adapter_file, write_adapter_tensors
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import describe_tensor, read_metadata

ABILITIES = Abilities(name="onnxruntime", layers=None, taken="all weights", ties=True, trains=True)


def write_ort(
    updates: Sequence[WeightUpdate], path: Path, saved: SavedAdapters, base: str | Path | None
) -> torch.dtype:
    """Write the file.

    Args:
        updates: the adapters.
        path: the file to write.
        saved: the folder that they come from, for what was trained besides.
        base: the file that ``export_onnx(..., adapters="runtime")`` wrote of the base model.

    Returns:
        The dtype of the adapters in the file.

    Raises:
        ConfigError: the base is missing or was exported in another way, or has no input for something that changed.
        ExportError: the base cannot be read, or was not exported by this library.
    """
    if base is None:
        raise ConfigError(
            "no base is given for onnxruntime, whose adapters are inputs of a certain file; expected the file that "
            "export_onnx(..., adapters='runtime') wrote; give it with --base (base= in Python)"
        )
    slots = _Slots(Path(base))
    tensors = slots.find_defaults()
    for update in updates:
        tensors |= slots.spell(update)
    for name, key in saved.replacements.items():
        value = saved.tensor(key)
        if name in slots.checksums and name not in slots.names:
            slots.assert_equal(name, value)
        elif value.is_floating_point():  # the file needs no others, such as the number of batches
            slots.assert_has(name, value)
            tensors[name] = value.to(tensors[name].dtype)
    write_adapter_tensors(path, tensors, slots.checksums)
    return tensors[input_names(updates[0].weight)[0]].dtype


def read_ort(path: Path) -> dict[str, torch.Tensor]:
    """ΔW [out, in] of each weight in float64, by onnxruntime's rule."""
    tensors = read_adapter_file(path).tensors
    found = {}
    for name, first in tensors.items():
        if name.endswith(".adapter_A") and first.shape[1]:
            weight = name.removesuffix(".adapter_A")
            found[weight] = (first.double() @ tensors[input_names(weight)[1]].double()).t()
    return found


class _Slots:
    """What a base file takes as an adapter."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = InitializerFile(path)
        description = read_metadata(self.file.header, path.name)
        if description.get("adapters") != "runtime":
            raise ConfigError(
                f"{path} has no inputs for adapters (it was exported with adapters={description.get('adapters')!r}), "
                "expected a file exported with adapters='runtime'; export it again"
            )
        self.sites: Mapping[str, Any] = description["sites"]
        self.checksums: Mapping[str, str] = description["base"]
        inputs = onnx.load(path, load_external_data=False).graph.input
        self.names = {value.name for value in inputs if value.name in self.file}

    def find_defaults(self) -> dict[str, torch.Tensor]:
        """What the inputs are without an adapter."""
        return {name: self.file.read(name) for name in self.names}

    def spell(self, update: WeightUpdate) -> dict[str, torch.Tensor]:
        """A and B of a weight."""
        first, second = input_names(update.weight)
        if first not in self.names:
            raise ConfigError(
                f"{self.path.name} has no inputs for an adapter of {update.weight}; it has them for "
                f"{', '.join(self.sites)}; export the base model with adapters at this weight"
            )
        found = {first: update.right.t(), second: update.left.t()}
        wanted = [self.sites[update.weight][side] for side in ("in", "out")]
        if [len(found[first]), found[second].shape[1]] != wanted:
            raise ConfigError(
                f"{update.weight} is {update.left.shape[0]} × {update.right.shape[1]} in the adapter, {self.path.name} "
                f"expects {wanted[1]} × {wanted[0]}; it belongs to another model"
            )
        dtype = self.file.dtype(first)
        return {name: value.contiguous().to(dtype) for name, value in found.items()}

    def assert_equal(self, name: str, value: torch.Tensor) -> None:
        """Raise :class:`ConfigError` unless a tensor that is a part of the base file has this value there."""
        if describe_tensor(value) != self.checksums[name]:
            raise ConfigError(
                f"{name} has moved or was trained fully, {self.path.name} has another value of it and no input for "
                "it, expected the same; fold the adapters, or export the base model from one that trains it as well"
            )

    def assert_has(self, name: str, value: torch.Tensor) -> None:
        """Raise :class:`ConfigError` unless a tensor that was trained besides can be put in."""
        if name not in self.names or self.file.shape(name) != tuple(value.shape):
            shape = list(self.file.shape(name)) if name in self.names else "no such input"
            raise ConfigError(
                f"{name} was trained fully and has shape {list(value.shape)}, {self.path.name} has {shape}; export the "
                "base model from one that trains it as well"
            )
