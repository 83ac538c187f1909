"""The checkpoint that adapters are folded into: one safetensors file, or shards and their index."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.json_files import read_json_file
from adapter_compiler.saving.primitives.paths import find_inside
from adapter_compiler.saving.primitives.safetensors_header import SafetensorsHeader, TensorPlace, read_safetensors
from passes.planning.json_schema import Field, Source, is_finite, is_object_of, is_text

INDEX_SUFFIX = ".safetensors.index.json"

_ADVICE = "fetch or save the checkpoint again"

_INDEX: Mapping[str, Field] = {
    "weight_map": Field(expected="the names of files by those of tensors", fits=is_object_of(is_text)),
    "metadata": Field(
        expected="an object in which total_size is a number",
        fits=lambda value: isinstance(value, dict) and is_finite(value.get("total_size", 0)),
        required=False,
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseCheckpoint:
    """A checkpoint of which headers have been read.

    Attributes:
        path: the file, or the index of the shards.
        shards: by the path of each file relative to the folder.
        tensors: the place of each tensor, by name, whether the index names it or not.
        shard_of: the key in ``shards`` of the file of each tensor.
        index: what the index holds; ``None`` where there is one file.
    """

    path: Path
    shards: Mapping[str, SafetensorsHeader]
    tensors: Mapping[str, TensorPlace]
    shard_of: Mapping[str, str]
    index: Mapping[str, Any] | None


def read_checkpoint(path: Path) -> BaseCheckpoint:
    """Read the headers of a checkpoint.

    Raises:
        CheckpointError: a file is missing or damaged, or the index names what is not there, or leads out of its folder.
    """
    if not path.name.endswith(INDEX_SUFFIX):
        file = read_safetensors(path)
        shard_of = dict.fromkeys(file.tensors, path.name)
        return BaseCheckpoint(path=path, shards={path.name: file}, tensors=file.tensors, shard_of=shard_of, index=None)
    index = read_json_file(path, _INDEX, advice=_ADVICE, allow_unknown=True)
    source = Source(name=str(path), error=CheckpointError, advice=_ADVICE)
    shard_of = {name: _normalize(source, path, name, file) for name, file in index["weight_map"].items()}
    shards = {name: read_safetensors(path.parent / name) for name in sorted(set(shard_of.values()))}
    if not shards:
        source.fail("weight_map names no tensor, expected one at least")
    if missing := [name for name, shard in shard_of.items() if name not in shards[shard].tensors]:
        source.fail(
            f"weight_map says that {missing[0]} is in {shard_of[missing[0]]}, which does not hold it, expected it there"
        )
    shard_of = _find_unnamed(source, shards, shard_of) | shard_of
    tensors = {name: shards[shard].tensors[name] for name, shard in shard_of.items()}
    return BaseCheckpoint(path=path, shards=shards, tensors=tensors, shard_of=shard_of, index=index)


def _find_unnamed(source: Source, shards: Mapping[str, SafetensorsHeader], named: Mapping[str, str]) -> dict[str, str]:
    """The shards of the tensors that the index does not name."""
    found: dict[str, str] = {}
    for shard, file in shards.items():
        for name in file.tensors.keys() - named.keys():
            if name in found:
                source.fail(
                    f"weight_map does not name {name}, which {found[name]} and {shard} hold, expected it to say which"
                )
            found[name] = shard
    return found


def _normalize(source: Source, path: Path, name: str, file: str) -> str:
    """The path of a shard relative to its index, such that each has one name."""
    find_inside(source, f"weight_map: {name}", path.parent, file)
    if not file.endswith(".safetensors"):
        source.refuse(f"weight_map: {name}", file, "the name of a .safetensors file")
    return PurePosixPath(file).as_posix()
