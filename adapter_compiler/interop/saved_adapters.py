"""Trained adapters as they lie in a folder: ours or PEFT's, read one site at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import passes.forms
from adapter_compiler.checkpoint import ADAPTERS, FILE_NAME
from adapter_compiler.errors import CheckpointError
from adapter_compiler.plain_data import read_aliases, read_sites
from passes.base import SiteError
from passes.fold_adapters import merge_weight
from passes.forms import AdapterForm
from passes.plan import AdapterPlan, PlannedAdapter
from passes.sites import AdapterSite

#: Values of a weight that are summed at once: two megabytes in float64.
_VALUES_AT_A_TIME = 1 << 18

#: Forms that can be merged by rows, and the parameter whose rows are those of ΔW.
_BY_ROWS = {"svd": "P", "lora": "B"}

PEFT_CONFIG = "adapter_config.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedAdapter:
    """One adapter in a file.

    Attributes:
        planned: its site, form and scale; the site's dtype is that of the adapter, the weight's is not known.
        tensors: name of each parameter → the tensor's name in the file.
    """

    planned: PlannedAdapter
    tensors: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SavedAdapters:
    """All adapters of a folder.

    Attributes:
        path: the safetensors file.
        kind: ``"adapter-compiler"``, ``"peft lora"`` or ``"peft adalora"``.
        adapters: by site.
        replacements: weight or buffer of the model that was trained fully → the tensor's name in the file.
    """

    path: Path
    kind: str
    adapters: Mapping[str, SavedAdapter]
    replacements: Mapping[str, str]

    def parameters_of(self, site: str) -> dict[str, torch.Tensor]:
        """The parameters of one adapter, in the shapes that its form expects."""
        saved = self.adapters[site]
        shapes = _natural_shapes(saved)
        found = {}
        for name, key in saved.tensors.items():
            tensor = self.tensor(key)
            found[name] = tensor.reshape(-1) if shapes[name] == 1 else tensor.flatten(1)
        return found

    def tensor(self, key: str) -> torch.Tensor:
        """One tensor of the file."""
        with open_safetensors(self.path) as file:
            tensor: torch.Tensor = file.get_tensor(key)
            return tensor

    @functools.cached_property
    def plan(self) -> AdapterPlan:
        """The adapters in the file's order."""
        return AdapterPlan(adapters=tuple(adapter.planned for adapter in self.adapters.values()))

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """The weight of this name with every ΔW for it; see :meth:`merge_one`."""
        for planned in self.plan.by_weight[name]:
            weight = self.merge_one(planned.site.name, weight)
        return weight

    def merge_one(self, site: str, weight: torch.Tensor) -> torch.Tensor:
        """W + ΔW, bit for bit what :meth:`AdaptedModel.fold` gives; a large weight is overwritten by rows.

        Each value of P diag(λ) Q or B A is the same sum over the rank, whichever rows are computed together.

        Raises:
            CheckpointError: the weight has not the shape that the adapter was trained on.
        """
        planned = self.adapters[site].planned
        if tuple(weight.shape) != planned.site.shape:
            raise CheckpointError(
                f"{self.path}: site {site} was trained on a weight of shape {list(planned.site.shape)}, the base has "
                f"{list(weight.shape)}; it belongs to another model"
            )
        parameters = self.parameters_of(site)
        rows = max(1, _VALUES_AT_A_TIME // max(1, planned.site.in_features))
        is_small = weight.shape[0] <= rows or planned.site.rows is not None
        if planned.form.name not in _BY_ROWS or planned.site.transposed or is_small:
            return merge_weight(weight, planned, parameters).weight
        for start in range(0, weight.shape[0], rows):
            block = weight[start : start + rows]
            weight[start : start + rows] = _merge_rows(planned, parameters, block, start)
        return weight


def _merge_rows(
    planned: PlannedAdapter, parameters: Mapping[str, torch.Tensor], block: torch.Tensor, start: int
) -> torch.Tensor:
    """The rows of W + ΔW from ``start`` on, as many as ``block`` has."""
    site = dataclasses.replace(planned.site, shape=tuple(block.shape))
    part = dataclasses.replace(planned, site=site, rank=min(planned.rank, site.largest_rank))
    left = _BY_ROWS[planned.form.name]
    own = {**parameters, left: parameters[left][start : start + len(block)]}
    return merge_weight(block, part, own).weight


def _natural_shapes(saved: SavedAdapter) -> dict[str, int]:
    """How many dimensions each parameter has in its form."""
    site = saved.planned.site
    shapes = saved.planned.form.parameter_shapes(site.out_features, site.in_features, saved.planned.rank)
    return {name: len(shape) for name, shape in shapes.items()}


def read_saved_adapters(folder: str | Path) -> SavedAdapters:
    """Look into a folder; nothing but headers is read.

    Args:
        folder: what ``AdaptedModel.save`` or PEFT's ``save_pretrained`` wrote.

    Raises:
        CheckpointError: it holds no adapters, or such that cannot be expressed as one ΔW a weight.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        return _read_own(folder / FILE_NAME)
    if (folder / PEFT_CONFIG).is_file():
        from adapter_compiler.interop.read_peft import read_peft_adapters

        return read_peft_adapters(folder)
    raise CheckpointError(
        f"{folder} holds no adapters; expected {FILE_NAME} (AdaptedModel.save) or {PEFT_CONFIG} (PEFT)"
    )


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file for reading.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file: {error}; expected a whole one; save it again"
        ) from error


def find_form(name: str) -> AdapterForm:
    """The form of this name.

    Raises:
        CheckpointError: there is none.
    """
    try:
        return passes.forms.find_form(name)
    except (KeyError, ValueError):
        known = ", ".join(passes.forms.FORMS)
        raise CheckpointError(f"adapters of the form {name!r} are unknown; known: {known}") from None


def _read_own(path: Path) -> SavedAdapters:
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
