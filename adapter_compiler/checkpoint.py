"""Save and load trained adapters: one safetensors file, described by JSON in its header.

The file holds the adapters, the fully trained parameters and the model's persistent buffers (running
statistics move while adapters train). It is written beside and renamed, so it is whole or absent.
"""

from __future__ import annotations

import dataclasses
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
from adapter_compiler.named_adapters import find_module_tensors
from passes.compact_ranks import compact_plan
from passes.forms import find_form
from passes.plan import AdapterPlan

#: Name of the file in the folder given to :func:`save_adapters`.
FILE_NAME = "adapters.safetensors"

#: Where the header's JSON stands in the metadata of every file of ours.
HEADER_KEY = "adapter_compiler"
_FORMAT_VERSION = 1


def save_adapters(adapted: AdaptedModel, directory: str | Path, *, name: str | None = None) -> Path:
    """Write ``directory/adapters.safetensors``, replacing an earlier one only when complete.

    Args:
        adapted: the model.
        directory: a folder; it is made if need be.
        name: which adapter of it; by default the active one.

    Returns:
        The file's path.

    Raises:
        CheckpointError: a tensor is on the meta device.
        OSError: the folder cannot be made or written.
    """
    path = Path(directory) / FILE_NAME
    tensors = {key: tensor.detach().contiguous().clone() for key, tensor in find_saved_tensors(adapted, name).items()}
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{key} is on the meta device, which holds no values; expected a tensor with values; load them first"
            )
    header = {HEADER_KEY: json.dumps(_describe(adapted, name)), "format": "pt"}
    with written_beside(path) as draft:
        save_file(tensors, draft, metadata=header)
    return path


def load_adapters(adapted: AdaptedModel, directory: str | Path) -> None:
    """Read what :meth:`AdaptedModel.save` wrote into the active adapter. Nothing changes if it does not fit.

    To add it as a further adapter, with whatever ranks and sites it has, see :meth:`AdaptedModel.load_adapter`.

    Sites that had fewer triplets when they were saved, because a budget compacted them, get as few here; make
    optimizers and budgets afterwards.

    Args:
        adapted: the same model, compiled with the same kind, rank, alpha and sites as the one that was trained. It
            need not be initialised in the same way: where the file's adapters start from is in the file.
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
    plan = match_starts(adapted.plan, header["sites"])
    kept = find_kept(path, header["sites"], plan)
    expected = _find_shapes(adapted, compact_plan(plan, kept))
    if missing := sorted(expected.keys() ^ tensors.keys()):
        raise CheckpointError(f"{path}: tensor {missing[0]} is on one side only; compile with the same trainable=")
    for name, shape in expected.items():
        if shape != tuple(tensors[name].shape):
            raise CheckpointError(f"{path}: {name} has shape {tuple(tensors[name].shape)}, this model expects {shape}")
    adopt_starts(adapted, plan)
    if kept:
        compact_adapters(adapted, kept)
    with torch.no_grad():
        for name, target in find_saved_tensors(adapted).items():
            target.copy_(tensors[name])


def find_kept(path: Path, saved: Mapping[str, Any], plan: AdapterPlan) -> dict[str, torch.Tensor]:
    """The sites that had fewer triplets when saved, and as many indices as they had.

    Raises:
        CheckpointError: other sites, shapes or scales, or a site that had more triplets.
    """
    mine = describe_plan(plan)
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


def match_starts(plan: AdapterPlan, saved: Mapping[str, Any]) -> AdapterPlan:
    """The plan with forms that keep starting values where those of a file do, as far as the kinds are the same."""
    adapters = []
    for adapter in plan:
        name = saved.get(adapter.site.name, {}).get("form", adapter.form.name)
        try:
            form = find_form(name)
        except KeyError:
            form = adapter.form
        same_kind = form.core.name == adapter.form.core.name
        adapters.append(dataclasses.replace(adapter, form=form) if same_kind else adapter)
    return AdapterPlan(adapters=tuple(adapters))


def adopt_starts(adapted: AdaptedModel, plan: AdapterPlan) -> None:
    """Give a model the forms of a plan that keep starting values or not; parameters that train keep their identity."""
    if plan != adapted.plan:
        adapted.adapters.adopt(plan)
        adapted.rebuild(plan)


def _find_shapes(adapted: AdaptedModel, plan: AdapterPlan) -> dict[str, tuple[int, ...]]:
    """What :func:`find_saved_tensors` will have with the forms of ``plan``."""
    others = {k: tuple(t.shape) for k, t in find_saved_tensors(adapted).items() if not k.startswith("adapters.")}
    own = {f"adapters.{a.site.name}.{name}": shape for a in plan for name, shape in a.parameter_shapes.items()}
    return own | others


def find_saved_tensors(adapted: AdaptedModel, name: str | None = None) -> dict[str, torch.Tensor]:
    """What training changes: parameters of an adapter (the active one), fully trained ones, persistent buffers."""
    name = adapted.active_adapter if name is None else name
    store, resting = adapted.store_of(name), adapted.adapter_set.find_resting(name)
    tensors = find_module_tensors(adapted) if resting is None else resting
    return {
        **{f"adapters.{key}": p for key, p in store.named_parameters()},
        **{f"module.{key}": tensor for key, tensor in tensors.items()},
    }


def _describe(adapted: AdaptedModel, name: str | None) -> dict[str, Any]:
    plan = adapted.plan if name is None else adapted.adapter_set.plans[name]
    aliases = {alias: adapter.site.weight for adapter in plan for alias in adapter.site.aliases}
    return {"version": _FORMAT_VERSION, "sites": describe_sites(adapted, name), "aliases": aliases}


def describe_sites(adapted: AdaptedModel, name: str | None = None) -> dict[str, dict[str, Any]]:
    """What a file of an adapter (the active one) must agree with, by site."""
    return describe_plan(adapted.plan if name is None else adapted.adapter_set.plans[name])


def describe_plan(plan: AdapterPlan) -> dict[str, dict[str, Any]]:
    """The same for a plan."""
    return {
        adapter.site.name: {
            "form": adapter.form.name,
            "rank": adapter.rank,
            "scale": adapter.scale,
            "shape": list(adapter.site.shape),
            "transposed": adapter.site.transposed,
            **({"rows": list(adapter.site.rows)} if adapter.site.rows else {}),
        }
        for adapter in plan
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
