"""Change files of ours as somebody would who knows the format."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

#: What is done to the header and the tensors of a file.
Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def read_header(path: Path) -> dict[str, Any]:
    """The header of a file of ours."""
    with safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()["adapter_compiler"])
    return header


def rewrite(path: Path, change: Change, *, keep_checksums: bool = False) -> None:
    """Change a file; its checksums go, as in files of earlier versions, so that what is behind them is looked at."""
    header, tensors = read_header(path), load_file(path)
    change(header, tensors)
    for key in () if keep_checksums else ("checksum", "tensors"):
        header.pop(key, None)
    save_file(tensors, path, metadata={"adapter_compiler": json.dumps(header), "format": "pt"})


def change_header(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Something that changes the header of the file that it is given."""
    return lambda path: rewrite(path, lambda header, _: change(header))


def change_tensor(path: Path, name: str, value: Tensor) -> None:
    """Put another tensor in the place of one."""
    rewrite(path, lambda _, tensors: tensors.update({name: value}))
