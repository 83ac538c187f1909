"""Save and load trained adapters: one safetensors file, described by JSON in its header.

The file holds the adapters, the fully trained parameters and the model's persistent buffers (running
statistics move while adapters train). It is written beside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.compaction import compact_adapters
from adapter_compiler.errors import CheckpointError
from adapter_compiler.files import written_beside
from passes.compact_ranks import compact_plan

#: Name of the file in the folder given to :func:`save_adapters`.
FILE_NAME = "adapters.safetensors"

#: Where the header's JSON stands in the metadata of every file of ours.
HEADER_KEY = "adapter_compiler"
_FORMAT_VERSION = 1


def save_adapters(adapted: AdaptedModel, directory: str | Path) -> Path:
    """Write ``directory/adapters.safetensors``, replacing an earlier one only when complete.

    Returns:
        The file's path.

    Raises:
        CheckpointError: a tensor is on the meta device.
        OSError: the folder cannot be made or written.
    """
    path = Path(directory) / FILE_NAME
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in find_saved_tensors(adapted).items()}
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{name} is on the meta device, which holds no values; expected a tensor with values; load them first"
            )
    header = {HEADER_KEY: json.dumps(_describe(adapted)), "format": "pt"}
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=header)
    return path


def load_adapters(adapted: AdaptedModel, directory: str | Path) -> None:
    """Read what :meth:`AdaptedModel.save` wrote into ``adapted``. Nothing changes if it does not fit.

    Sites that had fewer triplets when they were saved, because a budget compacted them, get as few here; make
    optimizers and budgets afterwards.

    Args:
        adapted: the same model, compiled with the same sites, rank and alpha as the one that was trained.
        directory: the folder that was given to ``save``.

    Raises:
        CheckpointError: the file is missing or damaged, or belongs to other sites, shapes or scales.
    """
    if not isinstance(adapted, AdaptedModel):
        raise CheckpointError(
            f"load_adapters(adapted=...) is a {type(adapted).__name__}, expected an AdaptedModel; give what "
            "compile_with_adapters returned"
        )
    path = Path(directory) / FILE_NAME
    header, tensors = read_file(path, "AdaptedModel.save")
    _assert_header(path, header)
    kept = find_kept(path, header["sites"], adapted)
    targets = find_saved_tensors(adapted)
    if missing := sorted(targets.keys() ^ tensors.keys()):
        raise CheckpointError(f"{path}: tensor {missing[0]} is on one side only; compile with the same trainable=")
    shapes = {name: tuple(target.shape) for name, target in targets.items()} | _find_shapes(adapted, kept)
    for name, shape in shapes.items():
        if shape != tuple(tensors[name].shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, this model expects {shape}")
    if kept:
        compact_adapters(adapted, kept)
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def find_kept(path: Path, saved: Mapping[str, Any], adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """The sites that had fewer triplets when saved, and as many indices as they had.

    Raises:
        CheckpointError: other sites, shapes or scales, or a site that had more triplets.
    """
    mine = describe_sites(adapted)
    assert_same_sites(path, saved, mine, apart_from=("rank",))
    kept = {}
    for name, expected in mine.items():
        found = saved[name].get("rank")
        if not isinstance(found, int) or not 0 <= found <= expected["rank"]:
            raise CheckpointError(
                f"{path}: site {name} was saved with rank={found}, this model has rank={expected['rank']}; compile "
                "with the rank and alpha that the run started with"
            )
        if found < expected["rank"]:
            kept[name] = torch.arange(found)
    return kept


def _find_shapes(adapted: AdaptedModel, kept: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """The shapes of all adapters' parameters when only ``kept`` is left."""
    return {
        f"adapters.{adapter.site.name}.{name}": shape
        for adapter in compact_plan(adapted.plan, kept)
        for name, shape in adapter.parameter_shapes.items()
    }


def find_saved_tensors(adapted: AdaptedModel) -> dict[str, torch.Tensor]:
    """What training changes in the model itself: adapters, fully trained parameters, persistent buffers."""
    state = adapted.module.state_dict(keep_vars=True)
    parameters = {f"module.{name}": p for name, p in adapted.module.named_parameters() if p.requires_grad}
    buffers = {f"module.{name}": b for name, b in adapted.module.named_buffers() if name in state}
    return {
        **{f"adapters.{name}": p for name, p in adapted.adapters.named_parameters()},
        **parameters,
        **buffers,
    }


def _describe(adapted: AdaptedModel) -> dict[str, Any]:
    aliases = {alias: adapter.site.name for adapter in adapted.plan for alias in adapter.site.aliases}
    return {"version": _FORMAT_VERSION, "sites": describe_sites(adapted), "aliases": aliases}


def describe_sites(adapted: AdaptedModel) -> dict[str, dict[str, Any]]:
    """What a file must agree with, by site."""
    return {
        adapter.site.name: {
            "form": adapter.form.name,
            "rank": adapter.rank,
            "scale": adapter.scale,
            "shape": list(adapter.site.shape),
            "transposed": adapter.site.transposed,
        }
        for adapter in adapted.plan
    }


def read_file(path: Path, writer: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The JSON of the header ({} if it is no object) and the tensors of a file that ``writer`` wrote.

    Raises:
        CheckpointError: it is missing, damaged, or not ours.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; expected a folder that {writer} wrote; save there first")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file ({error}), expected a whole one; save it again"
        ) from error
    if HEADER_KEY not in metadata:
        raise CheckpointError(
            f"{path} was not written by adapter-compiler (no {HEADER_KEY!r} in its header); expected a file that "
            f"{writer} wrote; give its folder"
        )
    try:
        header = json.loads(metadata[HEADER_KEY])
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: its header is not JSON ({error}); save it again") from error
    return header if isinstance(header, dict) else {}, tensors


def _assert_header(path: Path, header: Mapping[str, Any]) -> None:
    version = header.get("version")
    if version != _FORMAT_VERSION or "kind" in header:
        raise CheckpointError(
            f"{path}: its header has format version {version!r}, expected {_FORMAT_VERSION}; save the adapters again "
            "with this version of adapter-compiler"
        )
    if not isinstance(header.get("sites"), dict):
        raise CheckpointError(f"{path}: its header names no sites; save the adapters again")


def assert_same_sites(
    path: Path, saved: Mapping[str, Any], mine: Mapping[str, Any], *, apart_from: Collection[str] = ()
) -> None:
    """Raise :class:`CheckpointError` unless two descriptions from :func:`describe_sites` agree, some keys apart."""
    if odd := sorted(saved.keys() ^ mine.keys()):
        side = "the file" if odd[0] in saved else "this model"
        raise CheckpointError(f"{path}: {len(odd)} sites differ, for example {odd[0]} is in {side} only")
    for name, expected in mine.items():
        for key, value in expected.items():
            found = saved[name].get(key)
            if found != value and key not in apart_from:
                raise CheckpointError(
                    f"{path}: site {name} was saved with {key}={found}, this model has "
                    f"{key}={value}; compile the same model with the same rank and alpha"
                )
