"""Trained adapters as they lie in a folder: ours or PEFT's, read one site at a time."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

import passes.forms
from adapter_compiler.errors import CheckpointError
from passes.adapt.fold_adapters import merge_weight
from passes.forms import AdapterForm
from passes.planning.plan import AdapterPlan, PlannedAdapter

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
