"""Read JSON files: configurations and indexes, whoever wrote them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.paths import read_file_bytes
from passes.planning.json_schema import LARGEST_TEXT, Field, Source, check_object, parse_json


def read_json_file(
    path: Path,
    schema: Mapping[str, Field],
    *,
    advice: str,
    allow_unknown: bool = False,
    error: Callable[[str], Exception] = CheckpointError,
) -> dict[str, Any]:
    """The object that a file holds, checked against a schema.

    Args:
        path: the file.
        schema: which keys it has, and what each holds.
        advice: what the user can do if it does not, for messages.
        allow_unknown: whether there may be other keys.
        error: what to raise.

    Raises:
        CheckpointError: or ``error``: the file is missing, too large, no JSON, or something else than the schema says.
    """
    source = Source(name=str(path), error=error, advice=advice)
    value = parse_json(source, read_file_bytes(source, path, LARGEST_TEXT))
    return check_object(source, "", value, schema, allow_unknown=allow_unknown)
