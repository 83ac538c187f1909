"""Add an adapter of a folder, ours or PEFT's, to a model that was compiled."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.named_adapters import (
    add_inactive,
    fill_parameters,
    find_known_sites,
    find_module_tensors,
)
from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.fit_tensors import cast_exactly
from adapter_compiler.saving.folders.live_models import fit_to_model
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.primitives.snapshot import Snapshot
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.site import AdapterSite


def load_adapter(adapted: AdapterState, name: str, directory: str | Path) -> None:
    """Add an adapter from a folder; see :meth:`AdaptedModel.load_adapter`.

    The adapter keeps the dtype of the file, whatever that of the model is. Tensors that were trained fully get the
    dtypes of those in whose place they come; a cast that would change a value is refused, see
    :func:`adapter_compiler.saving.adapters.load_adapters`.
    """
    adapted.adapter_set.assert_free(name)
    saved = fit_to_model(read_saved_adapters(directory), adapted.module)
    saved.assert_plain("a model's adapter")
    known, live = find_known_sites(adapted), find_module_tensors(adapted)
    values = {site: saved.parameters_of(site) for site in saved.adapters}
    entries = saved.adapters.items()
    planned = [_fit_saved(saved, adapted, entry.planned, known, values[site]) for site, entry in entries]
    replacements = _fit_replacements(saved, live)
    order = {weight: place for place, weight in enumerate(known)}
    ordered = sorted(planned, key=lambda adapter: (order[adapter.site.weight], adapter.site.rows or (0, 0)))
    plan = AdapterPlan(adapters=tuple(ordered))
    by_first_name = {adapter.site.name: own for adapter, own in zip(planned, values.values(), strict=True)}
    before = Snapshot()
    for module in adapted.adapter_set.modules():
        before.add_attributes(module, levels=2)
    with before.put_back_if_it_fails():
        fill_parameters(add_inactive(adapted, name, plan, {**live, **replacements}), plan, by_first_name)


def _fit_replacements(saved: SavedAdapters, live: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What was trained fully, in the dtypes and on the devices of the tensors in whose place it comes."""
    found = {}
    for key, stored in saved.replacements.items():
        tensor = saved.tensor(stored)
        if key not in live or live[key].shape != tensor.shape:
            mine = "nothing that trains" if key not in live else f"shape {tuple(live[key].shape)}"
            raise CheckpointError(
                f"{saved.path}: {key} of shape {tuple(tensor.shape)} was trained fully, this model has {mine} there; "
                "compile with the same trainable="
            )
        found[key] = cast_exactly(saved.path, key, tensor, live[key].dtype).to(live[key].device)
    return found


def _fit_saved(
    saved: SavedAdapters,
    adapted: AdapterState,
    planned: PlannedAdapter,
    known: Mapping[str, AdapterSite],
    values: Mapping[str, torch.Tensor],
) -> PlannedAdapter:
    """A saved adapter planned for this model."""
    wanted = planned.site.name
    site = known.get(planned.site.weight)
    if site is None or adapted.base_weight(site.name).requires_grad:
        raise CheckpointError(
            f"{saved.path}: site {wanted} is no weight of this model that can carry an adapter; it belongs to another "
            "model, or this one trains the weight fully"
        )
    if site.shape != planned.site.shape or site.transposed != planned.site.transposed:
        raise CheckpointError(
            f"{saved.path}: site {wanted} was saved for a weight of shape {planned.site.shape} (stored in×out: "
            f"{planned.site.transposed}), this model has {site.shape} ({site.transposed}), expected the same; "
            "load it into the model that it was trained with"
        )
    dtype = _find_dtype(saved, wanted, values)
    name = site.name + planned.site.name.removeprefix(planned.site.weight)
    site = dataclasses.replace(site, name=name, rows=planned.site.rows)
    fitted = PlannedAdapter(site=site, form=planned.form, rank=planned.rank, scale=planned.scale, dtype=dtype)
    for key, shape in fitted.parameter_shapes.items():
        if key not in values or tuple(values[key].shape) != shape:
            found = tuple(values[key].shape) if key in values else "nothing"
            raise CheckpointError(f"{saved.path}: site {wanted}: {key} has {found}, expected shape {shape}")
    return fitted


def _find_dtype(saved: SavedAdapters, site: str, values: Mapping[str, torch.Tensor]) -> torch.dtype:
    """The dtype that holds what all parameters of a saved adapter are."""
    found = {tensor.dtype for tensor in values.values()}
    if not all(dtype.is_floating_point for dtype in found):
        raise CheckpointError(
            f"{saved.path}: site {site}: its parameters are {', '.join(map(str, found))}, expected floating-point "
            "numbers; save the adapter again"
        )
    return functools.reduce(torch.promote_types, found)
