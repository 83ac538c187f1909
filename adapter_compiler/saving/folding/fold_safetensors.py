"""Fold saved adapters into a safetensors checkpoint, one weight at a time, without the model's code.

A checkpoint is a header and the bytes of its tensors one after another. Folding changes neither shapes nor
dtypes, so the file is copied and the bytes of the adapted weights are overwritten: memory holds one weight.
Tensors that the base lacks (a new head) are appended behind the others.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.folding.base_checkpoint import BaseCheckpoint, read_checkpoint
from adapter_compiler.saving.folding.tied_weights import TIE, Ties, resolve_ties
from adapter_compiler.saving.onnx_files.initializers import to_buffer
from adapter_compiler.saving.primitives.safetensors_dtypes import DTYPE_NAMES
from adapter_compiler.saving.primitives.safetensors_header import (
    LENGTH_BYTES,
    SafetensorsHeader,
    TensorPlace,
    read_safetensors,
    read_tensor,
)

#: Called after each weight with its name, how many are done, and how many there are.
Progress = Callable[[str, int, int], None]

#: Dtypes in which a sum W + ΔW means what it says; fewer bits are codes that have scales, or too few for ΔW.
_SUMMABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

#: What tensors beside a quantized weight have in their names.
_SCALES = ("scale", "SCB", "absmax", "quant", "zero")


def fold_safetensors(
    base: Path,
    saved: SavedAdapters,
    out: Path,
    progress: Progress | None = None,
    *,
    config: Mapping[str, Any] | None = None,
    can_untie: bool = False,
) -> list[str]:
    """Write ``base`` with the adapters folded in to ``out``.

    Args:
        base: a ``.safetensors`` file, or the index of a sharded checkpoint (``*.safetensors.index.json``).
        saved: the adapters.
        out: the file to write; for a sharded checkpoint its index, the shards stand beside it under their names.
            It must lie in a folder of its own, so that a failure can remove what was written.
        progress: called after each weight.
        config: what the model's ``config.json`` says.
        can_untie: whether ``config.json`` is beside ``out`` and may be changed.

    Returns:
        Names of the tensors that were changed or added.

    Raises:
        CheckpointError: the base is damaged or lacks a weight, or a weight has another shape or dtype.
    """
    checkpoint = read_checkpoint(base)
    shapes = {name: place.shape for name, place in checkpoint.tensors.items()}
    weights = BaseWeights(name=str(checkpoint.path), shapes=shapes, config=config)
    saved = saved.fit(weights)
    ties = resolve_ties(saved, weights, lambda name: read_tensor(checkpoint.tensors[name]), can_untie=can_untie)
    changes = plan_changes(saved, checkpoint, ties)
    copies = _copy_shards(checkpoint, out)
    total = len(changes.merged) + len(changes.replaced) + len(changes.added) + len(ties.copies)
    done: list[str] = []
    for name, site in changes.merged.items():
        place = checkpoint.tensors[name]
        _overwrite(copies[checkpoint.shard_of[name]], place, saved.merge(site, read_tensor(place)))
        _report(progress, done, name, total)
    for name, key in changes.replaced.items():
        place = checkpoint.tensors[name]
        _overwrite(copies[checkpoint.shard_of[name]], place, _cast(saved, name, saved.tensor(key), place))
        _report(progress, done, name, total)
    added = {name: saved.tensor(key) for name, key in changes.added.items()}
    for name, source in ties.copies.items():
        value = read_tensor(checkpoint.tensors[source])
        is_merged = name in saved.changed
        added[name] = saved.merge(name, value) if is_merged else saved.tensor(saved.replacements[name]).to(value.dtype)
    if added:
        _append(copies[list(copies)[-1]], added)
        done += added
    if checkpoint.index is not None:
        _write_index(checkpoint, out, added)
    if ties.unties:
        text = json.dumps({**(config or {}), TIE: False}, indent=2, sort_keys=True)
        (out.parent / "config.json").write_text(text + "\n", encoding="utf-8")
    return done


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What folding will do.

    Attributes:
        merged: weight in the base → its first name in the model.
        replaced: weight in the base → the tensor of the file that replaces it.
        added: weight that the base lacks → the tensor of the file.
    """

    merged: Mapping[str, str]
    replaced: Mapping[str, str]
    added: Mapping[str, str]


def plan_changes(saved: SavedAdapters, checkpoint: BaseCheckpoint, ties: Ties) -> Changes:
    """Match sites and replacements with the tensors of the base, and check them before anything is written.

    Raises:
        CheckpointError: a site has no weight in the base, or one of another shape, or a quantized one; or a tensor that
            was trained fully has another shape or dtype there.
    """
    places, merged = checkpoint.tensors, dict(ties.also)
    for site, aliases in saved.changed.items():
        if site in ties.copies or site in ties.dropped:
            continue
        names = [name for name in (site, *aliases) if name in places]
        if not names:
            why = f" ({saved.edits[site].field})" if site in saved.edits else ""
            raise CheckpointError(
                f"{checkpoint.path}: no weight {site}, which {saved.path} adapts{why}; it has "
                f"{', '.join(list(places)[:4])}, …; it belongs to another model"
            )
        adapters = saved.plan.by_weight.get(site)
        for name in names:
            _assert_can_be_summed(checkpoint, places[name], adapters[0].site.shape if adapters else None)
            merged[name] = site
    replaced = {name: key for name, key in saved.replacements.items() if name in places}
    for name, key in replaced.items():
        _assert_can_be_replaced(checkpoint, places[name], saved.file.tensors[key], casts=saved.kind.startswith("peft"))
    gone = ties.dropped | ties.copies.keys()
    added = {name: key for name, key in saved.replacements.items() if name not in places and name not in gone}
    if odd := sorted(saved.loose & added.keys()):
        raise CheckpointError(
            f"{checkpoint.path}: {saved.path} holds a tensor {odd[0]}, which neither its configuration explains nor "
            "the base has, expected one that belongs to the model; remove it, or merge the adapters with PEFT"
        )
    return Changes(merged=merged, replaced=replaced, added=added)


def _assert_can_be_summed(checkpoint: BaseCheckpoint, place: TensorPlace, shape: tuple[int, ...] | None) -> None:
    if place.dtype not in _SUMMABLE:
        module = place.name.rpartition(".")[0] + "."
        own = [name for name in checkpoint.tensors if name.startswith(module) and any(s in name for s in _SCALES)]
        beside = f" with {', '.join(own[:3])} beside it" if own else ""
        raise CheckpointError(
            f"{checkpoint.path}: {place.name} is {place.dtype_name}{beside}, a quantized weight, to which no update "
            "can be added, expected floating-point numbers of 16 bits or more; dequantize the checkpoint first, or "
            "load the quantized model and call fold()"
        )
    if shape is not None and place.shape != shape:
        raise CheckpointError(
            f"{checkpoint.path}: {place.name} has shape {list(place.shape)}, the adapter was trained on "
            f"{list(shape)}; it belongs to another model"
        )


def _cast(saved: SavedAdapters, name: str, tensor: torch.Tensor, place: TensorPlace) -> torch.Tensor:
    """A tensor that was trained fully in the dtype of the base, which PEFT gives it when it loads a folder too."""
    cast = tensor if place.dtype is None else tensor.to(place.dtype)
    if cast is not tensor and bool((tensor.isfinite() & ~cast.isfinite()).any()):
        raise CheckpointError(
            f"{saved.path}: {name} has values that exceed the {place.dtype_name} of the base, expected none; fold "
            "into a base of a wider dtype"
        )
    return cast


def _assert_can_be_replaced(checkpoint: BaseCheckpoint, place: TensorPlace, other: TensorPlace, *, casts: bool) -> None:
    is_cast = casts and place.dtype in _SUMMABLE and other.dtype in _SUMMABLE
    if place.shape != other.shape or (place.dtype != other.dtype and not is_cast):
        raise CheckpointError(
            f"{checkpoint.path}: {place.name} has shape {list(place.shape)} and {place.dtype_name}, the one that was "
            f"trained has {list(other.shape)} and {other.dtype_name}, expected the same; it belongs to another model"
        )


def _copy_shards(checkpoint: BaseCheckpoint, out: Path) -> dict[str, Path]:
    """Copy the files to where the result goes, each to its place in the folder."""
    copies = {}
    for name, file in checkpoint.shards.items():
        copy = out.parent / (out.name if checkpoint.index is None else name)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if copy.exists():
            raise CheckpointError(f"{checkpoint.path}: {name} would overwrite {copy}, expected a place of its own")
        shutil.copyfile(file.path, copy)
        copies[name] = copy
    return copies


def _overwrite(copy: Path, place: TensorPlace, values: torch.Tensor) -> None:
    with copy.open("r+b") as file:
        file.seek(place.begin)
        file.write(to_buffer(values))


def _append(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add tensors behind the others, under a header that names them."""
    file = read_safetensors(path)
    header = _describe(file)
    end = path.stat().st_size - file.data_begin
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        header[name] = entry
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % LENGTH_BYTES)
    grown = path.with_name(path.name + ".grown")
    with path.open("rb") as old, grown.open("wb") as new:
        new.write(len(text).to_bytes(LENGTH_BYTES, "little") + text)
        old.seek(file.data_begin)
        shutil.copyfileobj(old, new, 1 << 24)
        for tensor in tensors.values():
            new.write(to_buffer(tensor))
    grown.replace(path)


def _describe(file: SafetensorsHeader) -> dict[str, object]:
    """The header of a file as it stands in it."""
    header: dict[str, object] = {"__metadata__": dict(file.metadata)} if file.metadata else {}
    for name, place in file.tensors.items():
        offsets = [place.begin - file.data_begin, place.end - file.data_begin]
        header[name] = {"dtype": place.dtype_name, "shape": list(place.shape), "data_offsets": offsets}
    return header


def _write_index(checkpoint: BaseCheckpoint, out: Path, added: Mapping[str, torch.Tensor]) -> None:
    """The index with the names of the tensors that were added to the last shard, and the size with them."""
    index = {**(checkpoint.index or {}), "weight_map": dict(checkpoint.shard_of)}
    index["weight_map"] |= dict.fromkeys(added, list(checkpoint.shards)[-1])
    if "total_size" in index.get("metadata", {}):
        sizes = [tensor.numel() * tensor.element_size() for tensor in added.values()]
        index["metadata"] = {**index["metadata"], "total_size": index["metadata"]["total_size"] + sum(sizes)}
    out.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _report(progress: Progress | None, done: list[str], name: str, total: int) -> None:
    done.append(name)
    if progress is not None:
        progress(name, len(done), total)
