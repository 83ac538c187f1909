"""Read a folder that ``AdaptedModel.save`` wrote, headers only."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.base_weights import BaseWeights, find_layouts
from adapter_compiler.saving.folders.saved_adapters import SavedAdapter, SavedAdapters, find_form
from adapter_compiler.saving.layer_kinds import LINEAR, LINEAR_OR_CONV1D, TrainedNames
from adapter_compiler.saving.primitives.adapter_file import ADAPTERS, read_sites
from adapter_compiler.saving.primitives.file_format import open_own_file
from adapter_compiler.saving.primitives.safetensors_header import TensorPlace
from adapter_compiler.saving.quantized_formats import read_formats
from passes.base import SiteError
from passes.planning.json_schema import Source
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.plan_json import assert_consistent
from passes.planning.site import AdapterSite

#: What the names of tensors begin with that were trained fully, and of buffers.
_MODULE = "module."

_ADAPTERS = "adapters."


def read_own_adapters(path: Path) -> SavedAdapters:
    """Look into the file; see :func:`~adapter_compiler.saving.folders.read_folder.read_saved_adapters`."""
    header, file = open_own_file(path, ADAPTERS)
    sites = read_sites(path, header)
    aliases = _group_aliases(path, header, sites)
    groups = _group_tensors(path, file.tensors, sites)
    adapters = {name: _read_site(path, name, entry, groups[name], aliases) for name, entry in sites.items()}
    try:
        AdapterPlan(adapters=tuple(adapter.planned for adapter in adapters.values()))
    except SiteError as error:
        raise CheckpointError(f"{path}: {error}; save the adapters again") from error
    replacements = {key.removeprefix(_MODULE): key for key in file.tensors if key.startswith(_MODULE)}
    source = Source(name=str(path), error=CheckpointError, advice="save the adapters again")
    saved = SavedAdapters(
        file=file,
        kind="adapter-compiler",
        adapters=_add_layers(adapters, header.get("layers", {})),
        replacements=replacements,
        quantized=read_formats(source, header.get("quantized", {})),
        trained=_read_trained(header),
    )
    return dataclasses.replace(saved, refit=functools.partial(_decide_layouts, saved))


def _read_trained(header: Mapping[str, Any]) -> TrainedNames | None:
    if "trained" not in header:
        return None
    moved = tuple(header["moved"]) if "moved" in header else None
    return TrainedNames(owners=header["trained"], unsaved=tuple(header.get("unsaved", ())), moved=moved)


def _add_layers(adapters: Mapping[str, SavedAdapter], layers: Mapping[str, str]) -> dict[str, SavedAdapter]:
    return {
        name: dataclasses.replace(saved, layer=layers.get(saved.planned.site.weight, ""))
        for name, saved in adapters.items()
    }


def _decide_layouts(saved: SavedAdapters, base: BaseWeights) -> SavedAdapters:
    """Adapters that were converted from PEFT's do not say how the weights of linear layers are stored."""
    sites = {n: one.planned.site for n, one in saved.adapters.items() if one.layer == LINEAR_OR_CONV1D}
    if not sites:
        return saved
    features = {name.removesuffix(".weight"): (site.out_features, site.in_features) for name, site in sites.items()}
    layouts = find_layouts(features, any(site.transposed for site in sites.values()), base)
    adapters = dict(saved.adapters)
    for name, site in sites.items():
        layout = layouts[name.removesuffix(".weight")]
        if layout is None:
            raise CheckpointError(
                f"{saved.path}: site {name}: its weight {list(site.shape)} may be that of a Linear or of a Conv1D, "
                "which is transposed, and the PEFT folder that it was converted from does not say which; load it "
                "into the model with load_adapter"
            )
        shape = site.shape if layout == site.transposed else site.shape[::-1]
        planned = dataclasses.replace(
            saved.adapters[name].planned, site=dataclasses.replace(site, transposed=layout, shape=shape)
        )
        adapters[name] = dataclasses.replace(saved.adapters[name], planned=planned, layer=LINEAR)
    return dataclasses.replace(saved, adapters=adapters, refit=None)


def _group_aliases(path: Path, header: Mapping[str, Any], sites: Mapping[str, Any]) -> dict[str, list[str]]:
    """The further names of each tied weight, by its first."""
    found: dict[str, list[str]] = {}
    for alias, first in header.get("aliases", {}).items():
        if alias in sites:
            raise CheckpointError(
                f"{path}: {alias} is a site and another name of {first} too, expected one of both; save the adapters "
                "again"
            )
        found.setdefault(first, []).append(alias)
    return found


def _group_tensors(
    path: Path, places: Mapping[str, TensorPlace], sites: Mapping[str, Any]
) -> dict[str, dict[str, TensorPlace]]:
    """The tensors of each site by the name of the parameter; each tensor of the file has its place."""
    found: dict[str, dict[str, TensorPlace]] = {name: {} for name in sites}
    for key, place in places.items():
        site, _, parameter = key.removeprefix(_ADAPTERS).rpartition(".")
        if key.startswith(_ADAPTERS) and site in found:
            found[site][parameter] = place
        elif not key.startswith(_MODULE):
            raise CheckpointError(
                f"{path}: the tensor {key} belongs to none of the sites {', '.join(list(sites)[:4])}, expected "
                "parameters of these; save the adapters again"
            )
    return found


def _read_site(
    path: Path,
    name: str,
    entry: Mapping[str, Any],
    tensors: Mapping[str, TensorPlace],
    aliases: Mapping[str, Sequence[str]],
) -> SavedAdapter:
    form, shape = find_form(path, entry["form"]), tuple(entry["shape"])
    shapes = {key: place.shape for key, place in tensors.items()}
    right = next((shapes[key] for key in ("Q", "A") if key in shapes), ())
    site = AdapterSite(
        name=name,
        shape=shape,
        dtype=torch.float32,
        transposed=entry["transposed"],
        rows=tuple(entry["rows"]) if "rows" in entry else None,
        # The columns of ΔW tell a convolution's kernel from a stack of matrices.
        op="convolution" if len(shape) > 2 and right[1:] == (math.prod(shape[1:]),) else "linear",
    )
    source = Source(name=str(path), error=CheckpointError, advice="save the adapters again")
    assert_consistent(source, f"site {name}", site, form)
    site = dataclasses.replace(site, aliases=tuple(aliases.get(site.weight, ())))
    try:
        planned = PlannedAdapter(
            site=site, form=form, rank=entry["rank"], scale=float(entry["scale"]), dtype=torch.float32
        )
    except SiteError as error:
        raise CheckpointError(f"{path}: {error}; save the adapters again") from error
    _assert_parameters_fit(source, planned, tensors)
    return SavedAdapter(planned=planned, tensors={key: place.name for key, place in tensors.items()})


def _assert_parameters_fit(source: Source, planned: PlannedAdapter, tensors: Mapping[str, TensorPlace]) -> None:
    found, expected = {key: place.shape for key, place in tensors.items()}, planned.parameter_shapes
    if found != expected:
        source.fail(f"site {planned.site.name} has {found}, expected {expected}")
    for key, place in tensors.items():
        if place.dtype is None or not place.dtype.is_floating_point:
            source.fail(f"site {planned.site.name}: {key} is {place.dtype_name}, expected floating-point numbers")
