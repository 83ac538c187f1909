"""Fold saved adapters into an ONNX file of the base model, one weight at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch

from adapter_compiler.errors import CheckpointError, ExportError
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import copy_with_metadata, read_metadata
from passes.planning.plan import AdapterPlan


class FoldSource(Protocol):
    """Where merged weights come from; see :class:`~adapter_compiler.saving.folders.saved_adapters.SavedAdapters`."""

    @property
    def path(self) -> Path:
        """The adapters' file, for messages."""

    @property
    def adapters(self) -> Mapping[str, Any]:
        """The sites."""

    @property
    def plan(self) -> AdapterPlan:
        """The same, with the weights that they belong to."""

    @property
    def replacements(self) -> Mapping[str, str]:
        """Weights that were trained fully, and their tensors."""

    def merge(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """W + ΔW."""

    def tensor(self, key: str) -> torch.Tensor:
        """A tensor of the file."""


def fold_onnx(
    base: Path, saved: FoldSource, draft: Path, progress: Callable[[str, int, int], None] | None = None
) -> list[str]:
    """Write ``base`` with the adapters folded in to ``draft``, and its external data beside it.

    Args:
        base: a file that ``export_onnx`` wrote of the model without adapters.
        saved: the adapters.
        draft: the file to write, in a folder of its own.
        progress: called after each weight.

    Returns:
        The weights that were changed.

    Raises:
        ExportError: the base is damaged, was not exported by this library, or already has adapters in it.
        CheckpointError: base and adapters do not belong together.
    """
    source = InitializerFile(base)
    description = read_metadata(source.header, base.name)
    if description["adapters"] == "merged":
        raise ExportError(f"{base.name} already has adapters merged into it; fold into an export of the base model")
    adapted = saved.plan.by_weight
    weights = _find_targets(description["weights"], saved, base)
    ranks = {site: adapter.planned.rank for site, adapter in saved.adapters.items()}
    copy_with_metadata(base, draft, {**description, "adapters": "merged", "ranks": ranks})
    _copy_external_data(source.external_files(), base, draft)
    file = InitializerFile(draft)
    for done, (name, initializer) in enumerate(weights.items(), 1):
        old = file.read(initializer)
        if name in adapted:
            file.write(initializer, saved.merge(name, old))
        else:
            _replace(file, initializer, saved.tensor(saved.replacements[name]), old)
        if progress is not None:
            progress(name, done, len(weights))
    return list(weights)


def _find_targets(weights: Mapping[str, Any], saved: FoldSource, base: Path) -> dict[str, str]:
    """Weight to change → its initializer."""
    known = {alias: entry["initializer"] for entry in weights.values() for alias in entry["aliases"]}
    known |= {name: entry["initializer"] for name, entry in weights.items()}
    targets: dict[str, str] = {}
    adapted = saved.plan.by_weight
    for name in (*adapted, *saved.replacements):
        if name in known:
            targets[name] = known[name]
        elif name in adapted:
            raise CheckpointError(
                f"{base.name}: weight {name}, which {saved.path} adapts, does not stand in the file as a whole; "
                "the adapters belong to another model, or the exporter folded the weight into something else"
            )
    return targets


def _replace(file: InitializerFile, name: str, values: torch.Tensor, old: torch.Tensor) -> None:
    if values.shape != old.shape or values.dtype != old.dtype:
        raise CheckpointError(
            f"{file.path.name}: {name} has shape {list(old.shape)} and {old.dtype}, the saved one {list(values.shape)} "
            f"and {values.dtype}; the adapters belong to another model"
        )
    file.write(name, values)


def _copy_external_data(names: Collection[str], base: Path, draft: Path) -> None:
    """Under names of the new file, so that folding twice in one folder overwrites nothing."""
    if not names:
        return
    wanted = {
        name: draft.name + (name.removeprefix(base.name) if name.startswith(base.name) else "." + Path(name).name)
        for name in names
    }
    for name, other in wanted.items():
        shutil.copyfile(base.parent / name, draft.parent / other)
    model = onnx.load(draft, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = wanted[entry.value]
    onnx.save(model, draft)
