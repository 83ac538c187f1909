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
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.onnx_files.initializers import to_buffer

#: Called after each weight with its name, how many are done, and how many there are.
Progress = Callable[[str, int, int], None]

INDEX_SUFFIX = ".safetensors.index.json"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorPlace:
    """Where a tensor lies: its file, dtype, shape, and byte range in that file."""

    file: Path
    dtype: torch.dtype | None
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file, and where its data begins.

    Raises:
        CheckpointError: the file is missing, truncated, or no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if not 2 <= length <= _LARGEST_HEADER:
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
            start = _LENGTH_BYTES + length
            wanted = start + max((entry["data_offsets"][1] for entry in _entries(header).values()), default=0)
            if path.stat().st_size != wanted:
                raise ValueError(f"it has {path.stat().st_size} bytes, its header describes {wanted}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file: {error}; expected a whole one; fetch or save it again"
        ) from error
    return header, start


def find_tensors(path: Path) -> dict[str, TensorPlace]:
    """Every tensor of a safetensors file."""
    header, start = read_header(path)
    return {
        name: TensorPlace(
            file=path,
            dtype=_DTYPES.get(entry["dtype"]),
            shape=tuple(entry["shape"]),
            begin=start + entry["data_offsets"][0],
            end=start + entry["data_offsets"][1],
        )
        for name, entry in _entries(header).items()
    }


def fold_safetensors(base: Path, saved: SavedAdapters, out: Path, progress: Progress | None = None) -> list[str]:
    """Write ``base`` with the adapters folded in to ``out``.

    Args:
        base: a ``.safetensors`` file, or the index of a sharded checkpoint (``*.safetensors.index.json``).
        saved: the adapters.
        out: the file to write; for a sharded checkpoint its index, the shards stand beside it under their names.
            It must lie in a folder of its own, so that a failure can remove what was written.
        progress: called after each weight.

    Returns:
        Names of the tensors that were changed or added.

    Raises:
        CheckpointError: the base is damaged or lacks a weight, or a weight has another shape or dtype.
    """
    shards = _find_shards(base)
    places = {name: place for shard in shards for name, place in find_tensors(shard).items()}
    changes = plan_changes(saved, places, base)
    added = {name: key for name, key in saved.replacements.items() if name not in changes.replaced}
    copies = {shard: out.parent / (out.name if shard == base else shard.name) for shard in shards}
    for shard, copy in copies.items():
        shutil.copyfile(shard, copy)
    total = len(changes.merged) + len(changes.replaced) + len(added)
    done: list[str] = []
    for name, site in changes.merged.items():
        place = places[name]
        _overwrite(copies[place.file], place, saved.merge(site, _read(place)))
        _tell(progress, done, name, total)
    for name, key in changes.replaced.items():
        _overwrite(copies[places[name].file], places[name], saved.tensor(key))
        _tell(progress, done, name, total)
    if added:
        _append(copies[shards[-1]], {name: saved.tensor(key) for name, key in added.items()})
        done += added
    if base.name.endswith(INDEX_SUFFIX):
        _write_index(base, out, shards[-1].name, added, saved)
    return done


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """What folding will do.

    Attributes:
        merged: weight in the base → its first name in the model.
        replaced: weight in the base → the tensor of the file that replaces it.
    """

    merged: Mapping[str, str]
    replaced: Mapping[str, str]


def plan_changes(saved: SavedAdapters, places: Mapping[str, TensorPlace], base: Path) -> Changes:
    """Match sites and replacements with the tensors of the base, and check shapes before anything is written.

    Raises:
        CheckpointError: a site has no weight in the base, or one of another shape.
    """
    merged: dict[str, str] = {}
    for site, (adapter, *_) in saved.plan.by_weight.items():
        names = [name for name in (site, *adapter.site.aliases) if name in places]
        if not names:
            raise CheckpointError(
                f"{base}: no weight {site}, which {saved.path} adapts; it has {', '.join(list(places)[:4])}, …; "
                "it belongs to another model"
            )
        for name in names:
            if places[name].shape != adapter.site.shape:
                raise CheckpointError(
                    f"{base}: {name} has shape {list(places[name].shape)}, the adapter was trained on "
                    f"{list(adapter.site.shape)}; it belongs to another model"
                )
            merged[name] = site
    replaced = {name: key for name, key in saved.replacements.items() if name in places}
    return Changes(merged=merged, replaced=replaced)


def _entries(header: Mapping[str, Any]) -> dict[str, Any]:
    return {name: entry for name, entry in header.items() if name != "__metadata__"}


def _find_shards(base: Path) -> list[Path]:
    if not base.name.endswith(INDEX_SUFFIX):
        return [base]
    try:
        weight_map = json.loads(base.read_text(encoding="utf-8"))["weight_map"]
        return [base.parent / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{base} is no index of a sharded checkpoint: {error}") from error


def _read(place: TensorPlace) -> torch.Tensor:
    if place.dtype is None:
        raise CheckpointError(f"{place.file}: a weight to fold into has a dtype that torch does not have")
    data = bytearray(place.end - place.begin)
    with place.file.open("rb") as file:
        file.seek(place.begin)
        file.readinto(data)
    return torch.frombuffer(data, dtype=place.dtype).reshape(place.shape)


def _overwrite(copy: Path, place: TensorPlace, values: torch.Tensor) -> None:
    if tuple(values.shape) != place.shape or values.dtype != place.dtype:
        raise CheckpointError(
            f"{place.file}: a tensor of shape {list(place.shape)} and {place.dtype} cannot take the saved one of "
            f"{list(values.shape)} and {values.dtype}; it belongs to another model"
        )
    with copy.open("r+b") as file:
        file.seek(place.begin)
        file.write(to_buffer(values))


def _append(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add tensors behind the others, under a header that names them."""
    header, start = read_header(path)
    end = path.stat().st_size - start
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entry = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        header[name] = entry
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    grown = path.with_name(path.name + ".grown")
    with path.open("rb") as old, grown.open("wb") as new:
        new.write(len(text).to_bytes(_LENGTH_BYTES, "little") + text)
        old.seek(start)
        shutil.copyfileobj(old, new, 1 << 24)
        for tensor in tensors.values():
            new.write(to_buffer(tensor))
    grown.replace(path)


def _write_index(base: Path, out: Path, shard: str, added: Mapping[str, str], saved: SavedAdapters) -> None:
    index = json.loads(base.read_text(encoding="utf-8"))
    for name, key in added.items():
        index["weight_map"][name] = shard
        tensor = saved.tensor(key)
        if "total_size" in index.get("metadata", {}):
            index["metadata"]["total_size"] += tensor.numel() * tensor.element_size()
    out.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tell(progress: Progress | None, done: list[str], name: str, total: int) -> None:
    done.append(name)
    if progress is not None:
        progress(name, len(done), total)
