"""Read a folder that ``AdaptedModel.save`` wrote, headers only."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.saved_adapters import SavedAdapter, SavedAdapters, find_form, open_safetensors
from adapter_compiler.saving.primitives.adapter_file import ADAPTERS
from adapter_compiler.saving.primitives.plain_data import read_aliases, read_sites
from passes.base import SiteError
from passes.planning.plan import PlannedAdapter
from passes.planning.site import AdapterSite


def read_own_adapters(path: Path) -> SavedAdapters:
    """Look into the file; see :func:`~adapter_compiler.saving.folders.read_folder.read_saved_adapters`."""
    with open_safetensors(path) as file:
        metadata = file.metadata() or {}
        shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118 - not a mapping
    header = ADAPTERS.read_header(path, metadata)
    sites = read_sites(path, header)
    aliases: dict[str, list[str]] = {}
    for alias, first in read_aliases(path, header).items():
        aliases.setdefault(first, []).append(alias)
    adapters = {name: _read_site(path, name, entry, shapes, aliases) for name, entry in sites.items()}
    prefix = "module."
    replacements = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    return SavedAdapters(path=path, kind="adapter-compiler", adapters=adapters, replacements=replacements)


def _read_site(
    path: Path,
    name: str,
    entry: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    aliases: Mapping[str, Sequence[str]],
) -> SavedAdapter:
    prefix = f"adapters.{name}."
    tensors = {key.removeprefix(prefix): key for key in shapes if key.startswith(prefix)}
    if not tensors:
        raise CheckpointError(f"{path}: no parameters for site {name}; save the adapters again")
    shape = tuple(entry["shape"])
    right = next((shapes[tensors[name]] for name in ("Q", "A") if name in tensors), ())
    site = AdapterSite(
        name=name,
        shape=shape,
        dtype=torch.float32,
        transposed=bool(entry["transposed"]),
        rows=tuple(entry["rows"]) if entry.get("rows") else None,
        # The columns of ΔW tell a convolution's kernel from a stack of matrices.
        op="convolution" if len(shape) > 2 and right[1:] == (math.prod(shape[1:]),) else "linear",
    )
    site = dataclasses.replace(site, aliases=tuple(aliases.get(site.weight, ())))
    form, rank, scale = find_form(entry["form"]), entry["rank"], float(entry["scale"])
    try:
        planned = PlannedAdapter(site=site, form=form, rank=rank, scale=scale, dtype=torch.float32)
    except SiteError as error:
        raise CheckpointError(f"{path}: {error}; save the adapters again") from error
    tensors = {key: value for key, value in tensors.items() if "." not in key}
    found, expected = {key: shapes[value] for key, value in tensors.items()}, planned.parameter_shapes
    if found != expected:
        raise CheckpointError(f"{path}: site {name} has {found}, expected {expected}; save the adapters again")
    return SavedAdapter(planned=planned, tensors=tensors)
