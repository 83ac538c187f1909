"""What files of ours hold: a header of one form, and nested states as JSON text and named tensors, without pickle.

JSON knows no tuples, no keys but strings and no tensors, so these are written as marked objects. Floats keep
every bit: JSON text holds the shortest digits that give the same float back.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from adapter_compiler.errors import CheckpointError

#: Where the header's JSON stands in the metadata of every file of ours.
HEADER_KEY = "adapter_compiler"

_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileFormat:
    """A kind of file: what its header says, and who writes it.

    Attributes:
        kind: what the header has under ``kind``; ``None`` for saved adapters, whose header has no such key.
        version: what it has under ``version``; files of any other are not read.
        writer: what writes such files, for messages.
    """

    kind: str | None
    version: int
    writer: str

    def make_metadata(self, header: Mapping[str, Any]) -> dict[str, str]:
        """The metadata of a safetensors file with this header, to which kind and version are added."""
        kind = {} if self.kind is None else {"kind": self.kind}
        return {HEADER_KEY: json.dumps({**kind, "version": self.version, **header}), "format": "pt"}

    def read_header(self, path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
        """The header of a file of this format. Every reader of our files goes through here.

        Args:
            path: the file, for messages.
            metadata: the metadata of the safetensors file.

        Raises:
            CheckpointError: it is not ours, damaged, or of another format or version.
        """
        if HEADER_KEY not in metadata:
            raise CheckpointError(
                f"{path} was not written by adapter-compiler (no {HEADER_KEY!r} in its header); expected a file that "
                f"{self.writer} wrote; give its folder"
            )
        try:
            header = json.loads(metadata[HEADER_KEY])
        except (ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{path}: its header is not JSON ({error}), expected that of a whole file; save it again"
            ) from error
        header = header if isinstance(header, dict) else {}
        self._assert_same_format(path, header)
        return header

    def _assert_same_format(self, path: Path, header: Mapping[str, Any]) -> None:
        kind, version = header.get("kind"), header.get("version")
        if kind == self.kind and type(version) is int and version == self.version:
            return
        if kind is self.kind is None:
            problem = f"its header has format version {version!r}, expected {self.version}"
        else:
            found, expected = (name or "saved adapters" for name in (kind, self.kind))
            problem = f"it holds {found!r} of version {version!r}, expected {expected!r} of version {self.version}"
        raise CheckpointError(
            f"{path}: {problem}; give a file that {self.writer} of this version of adapter-compiler wrote, or save it "
            "again with that"
        )


def read_file(path: Path, file_format: FileFormat) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The header and the tensors of a file.

    Raises:
        CheckpointError: it is missing, damaged, not ours, or of another format or version.
    """
    if not path.is_file():
        raise CheckpointError(
            f"{path} does not exist; expected a folder that {file_format.writer} wrote; save there first"
        )
    try:
        with safe_open(path, framework="pt") as file:
            header = file_format.read_header(path, file.metadata() or {})
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file ({error}), expected a whole one; save it again"
        ) from error


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


#: What a header says of a site: the words for what is expected, and whether a value is that.
_SITE: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "form": ("the name of a form", lambda value: isinstance(value, str)),
    "rank": ("a number of triplets", _is_count),
    "scale": ("a finite number", lambda value: type(value) in (int, float) and abs(value) < math.inf),
    "shape": ("a list of sizes", lambda value: isinstance(value, list) and bool(value) and all(map(_is_count, value))),
    "transposed": ("true or false", lambda value: isinstance(value, bool)),
    "rows": (
        "[first, end]",
        lambda value: (
            isinstance(value, list) and len(value) == 2 and all(map(_is_count, value)) and value[0] < value[1]
        ),
    ),
}


def read_sites(path: Path, header: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What a header says of each site, as ``describe_sites`` gave it.

    Raises:
        CheckpointError: it says nothing of sites, or something that is no description of one.
    """
    sites = header.get("sites")
    if not isinstance(sites, dict):
        raise CheckpointError(f"{path}: its header names no sites; save the adapters again")
    for name, entry in sites.items():
        found = {"rows": [0, 1], **entry} if isinstance(entry, dict) else {}
        for key, (expected, fits) in _SITE.items():
            if key not in found or not fits(found[key]):
                raise CheckpointError(
                    f"{path}: site {name} was saved with {key}={found.get(key)!r}, expected {expected}; save the "
                    "adapters again"
                )
    return sites


def read_aliases(path: Path, header: Mapping[str, Any]) -> dict[str, str]:
    """By each further name of a tied weight, the name of its site's weight.

    Raises:
        CheckpointError: the header has something else there.
    """
    aliases = header.get("aliases", {})
    if not isinstance(aliases, dict) or not all(isinstance(name, str) for name in aliases.values()):
        raise CheckpointError(
            f"{path}: its header has aliases={aliases!r}, expected names by name; save the adapters again"
        )
    return aliases


def encode(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """``value`` as JSON can hold it; its tensors go into ``tensors`` under names of their own like ``name``.

    Raises:
        CheckpointError: something in it is neither plain data nor a tensor.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, torch.Tensor):
        # {"a.b": t} and {"a": {"b": t}} would have the same name.
        names = itertools.chain([name], (f"{name}#{number}" for number in itertools.count(2)))
        own = next(free for free in names if free not in tensors)
        tensors[own] = value.detach().contiguous().clone()
        return {_TENSOR: own}
    if isinstance(value, Mapping):
        items = [[key, encode(one, f"{name}.{key}", tensors)] for key, one in value.items()]
        is_plain = all(isinstance(key, str) and key not in (_TENSOR, _TUPLE, _ITEMS) for key in value)
        return dict(items) if is_plain else {_ITEMS: [[encode(key, name, tensors), one] for key, one in items]}
    if isinstance(value, (list, tuple)):
        parts = [encode(one, f"{name}.{i}", tensors) for i, one in enumerate(value)]
        return {_TUPLE: parts} if isinstance(value, tuple) else parts
    raise CheckpointError(
        f"{name} is a {type(value).__name__}, which cannot be saved without pickle; expected numbers, text, tensors, "
        "and dicts, lists and tuples of them"
    )


def decode(value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """What :func:`encode` was given.

    Raises:
        CheckpointError: a tensor is missing, or something is not as :func:`encode` writes it.
    """
    if isinstance(value, list):
        return [decode(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    marks = value.keys() & {_TENSOR, _TUPLE, _ITEMS}
    if not marks:
        return {key: decode(one, tensors) for key, one in value.items()}
    if len(value) > 1:
        raise CheckpointError(f"{', '.join(sorted(value))} stand beside each other, expected {min(marks)} alone")
    mark, content = next(iter(value.items()))
    if mark == _TENSOR:
        return _find_tensor(content, tensors)
    if not isinstance(content, list):
        raise CheckpointError(f"{mark} holds a {type(content).__name__}, expected a list; save the state again")
    return tuple(decode(one, tensors) for one in content) if mark == _TUPLE else _decode_items(content, tensors)


def _find_tensor(name: Any, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    if not isinstance(name, str) or name not in tensors:
        raise CheckpointError(f"the file has no tensor {name}; save the state again")
    return tensors[name]


def _decode_items(items: list[Any], tensors: Mapping[str, torch.Tensor]) -> dict[Any, Any]:
    found = {}
    for item in items:
        key, value = (decode(one, tensors) for one in item) if isinstance(item, list) and len(item) == 2 else ([], None)
        if not isinstance(key, Hashable):
            raise CheckpointError(f"{_ITEMS} holds {item!r}, expected [key, value]; save the state again")
        found[key] = value
    return found


def copy_state(value: Any) -> Any:
    """Nested dicts, lists and tuples with copies of their tensors, by which a state stays as it is now."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, Mapping):
        return {key: copy_state(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [*map(copy_state, value)] if isinstance(value, list) else tuple(map(copy_state, value))
    return value


def is_same_state(one: Any, other: Any) -> bool:
    """Whether two states are the same, tensors bit for bit."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor) and has_same_bits(one, other)
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return one.keys() == other.keys() and all(is_same_state(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(is_same_state, one, other))
    return bool(one is other or one == other or (one != one and other != other))


def has_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are equal in shape, dtype and every bit, NaN and signed zeros as well."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (t.detach().contiguous().reshape(-1).view(torch.uint8).cpu() for t in (one, other))
    return torch.equal(first, second)
