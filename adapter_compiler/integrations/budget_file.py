"""The file of a budget in a checkpoint: safetensors with JSON in its header and checksums, read without pickle."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.adapters import explained
from adapter_compiler.saving.primitives.file_format import FileFormat, read_file
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.primitives.plain_data import decode, encode
from passes.planning.json_schema import Field, is_count, is_text, show

_FORMAT = FileFormat(
    kind="budget of a checkpoint",
    version=1,
    writer="TrainerBudget",
    schema={
        "run": Field(expected="the name of a run", fits=is_text),
        "step": Field(expected="a number of steps", fits=is_count),
        "loss": Field(expected="null or a number", fits=lambda value: value is None or type(value) in (int, float)),
        "budget": Field(expected="an object", fits=lambda value: isinstance(value, dict)),
    },
)


def write_budget(path: Path, state: Mapping[str, Any], *, run: str, step: int, loss: float | None) -> None:
    """Write the state of a budget; an earlier file is replaced only when the new one is complete.

    Args:
        path: the file.
        state: from :meth:`RankBudget.state_dict`.
        run: the name of the run that the checkpoint belongs to.
        step: the optimizer step of the checkpoint.
        loss: the last loss that was logged.
    """
    tensors: dict[str, torch.Tensor] = {}
    header = {"run": run, "step": step, "loss": loss, "budget": encode(dict(state), "budget", tensors)}
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=_FORMAT.make_metadata(header, tensors))


def read_budget(path: Path) -> dict[str, Any]:
    """What :func:`write_budget` was given, by name; ``budget`` is the state.

    Raises:
        CheckpointError: the file is missing, damaged, or not ours.
    """
    header, tensors = read_file(path, _FORMAT)
    with explained(path, "the state of the budget"):
        header["budget"] = decode(header["budget"], tensors)
    if tensors:
        raise CheckpointError(
            f"{path}: the tensor {show(min(tensors))} belongs to no part of the state, expected a place for each; "
            "resume from another checkpoint"
        )
    return header
