"""Fold saved adapters into an ONNX file of the base model, one weight at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import onnx
import torch

from adapter_compiler.errors import CheckpointError, ExportError
from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from adapter_compiler.saving.onnx_files.metadata import (
    append_updates,
    copy_with_metadata,
    describe_tensor,
    read_metadata,
)
from passes.planning.json_schema import Field, Source, check_object, is_list_of, is_object_of, is_text


class FoldSource(Protocol):
    """Where merged weights come from; see :class:`~adapter_compiler.saving.folders.saved_adapters.SavedAdapters`."""

    @property
    def path(self) -> Path:
        """The adapters' file, for messages."""

    @property
    def kind(self) -> str:
        """Who wrote them."""

    def fit(self, base: BaseWeights) -> FoldSource:
        """The adapters as a base needs them."""

    @property
    def adapters(self) -> Mapping[str, Any]:
        """The sites."""

    @property
    def changed(self) -> Mapping[str, Any]:
        """The tensors that change but are not replaced."""

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
    description = _read_description(source, base)
    if description["adapters"] == "merged":
        raise ExportError(f"{base.name} already has adapters merged into it; fold into an export of the base model")
    if "quantized" in description:
        raise ExportError(
            f"{base.name} is a quantized copy, whose weights are rounded, expected the file in float that it was made "
            "from; fold into that one, and quantize the result with quantize_onnx, which says what rounding does to "
            "the updates"
        )
    saved = saved.fit(_describe_weights(description["weights"], source, base))
    adapted = saved.changed
    weights = _find_targets(description, saved, base)
    for name, initializer in weights.items():
        _assert_readable(source, initializer, must_be_floating=name in adapted)
    ranks = {site: adapter.planned.rank for site, adapter in saved.adapters.items()}
    # The merged weights are no base for run-time adapters.
    kept = {key: value for key, value in description.items() if key != "base"}
    copy_with_metadata(base, draft, {**kept, "adapters": "merged", "ranks": ranks})
    _copy_external_data(source.external_files(), base, draft)
    file = InitializerFile(draft)
    norms = {}
    for done, (name, initializer) in enumerate(weights.items(), 1):
        old = file.read(initializer)
        if name in adapted:
            merged = saved.merge(name, old)
            wide = torch.promote_types(old.dtype, torch.float32)
            norms[name] = float((merged.to(wide) - old.to(wide)).norm(dtype=torch.float64))
            file.write(initializer, merged)
        else:
            _assert_same_kind(base, initializer, saved.tensor(saved.replacements[name]), old)
            file.write(initializer, saved.tensor(saved.replacements[name]))
        if progress is not None:
            progress(name, done, len(weights))
    append_updates(draft, norms)
    return list(weights)


#: What the description of a file says that is used here.
_DESCRIPTION: Mapping[str, Field] = {
    "adapters": Field(expected="'merged', 'runtime' or 'none'", fits=is_text),
    "weights": Field(expected="an object of weights", fits=is_object_of(lambda value: isinstance(value, dict))),
    "folded": Field(expected="checksums of tensors", fits=is_object_of(is_text), required=False),
}

_WEIGHT: Mapping[str, Field] = {
    "initializer": Field(expected="the name of an initializer", fits=is_text),
    "aliases": Field(expected="a list of names", fits=is_list_of(is_text)),
}


def _read_description(file: InitializerFile, base: Path) -> dict[str, Any]:
    """What a file says of itself, as far as folding needs it."""
    source = Source(name=str(base), error=ExportError, advice="export the base model again")
    description = read_metadata(file.header, base.name)
    check_object(source, "its description", description, _DESCRIPTION, allow_unknown=True)
    for name, entry in description["weights"].items():
        check_object(source, f"its description: weight {name}", entry, _WEIGHT, allow_unknown=True)
        names, found = [name, *entry["aliases"]], entry["initializer"]
        if found.rstrip("_") not in [one.rstrip("_") for one in names]:  # exporters add underscores
            source.refuse(f"its description: weight {name}: initializer", found, f"one of {', '.join(names)}")
    return description


def _assert_readable(file: InitializerFile, initializer: str, *, must_be_floating: bool) -> None:
    dtype = file.dtype(initializer) if initializer in file else None
    if dtype is None or (must_be_floating and not dtype.is_floating_point):
        found = f"values of dtype {dtype}" if initializer in file else "no such initializer"
        expected = "floating-point numbers" if must_be_floating else "numbers"
        raise ExportError(
            f"{file.path}: its description names the weight {initializer}, but the file has {found} there, expected "
            f"{expected}; export the base model again"
        )


def _describe_weights(weights: Mapping[str, Any], file: InitializerFile, base: Path) -> BaseWeights:
    """The shapes of the weights, for adapters that depend on them."""
    names = {name: entry["initializer"] for name, entry in weights.items()}
    names |= {alias: entry["initializer"] for entry in weights.values() for alias in entry["aliases"]}
    shapes = {name: file.shape(initializer) for name, initializer in names.items() if initializer in file}
    return BaseWeights(name=base.name, shapes=shapes)


def _find_targets(description: Mapping[str, Any], saved: FoldSource, base: Path) -> dict[str, str]:
    """Weight to change → its initializer."""
    weights, folded = description["weights"], description.get("folded")
    known = {alias: entry["initializer"] for entry in weights.values() for alias in entry["aliases"]}
    known |= {name: entry["initializer"] for name, entry in weights.items()}
    targets: dict[str, str] = {}
    for name in (*saved.changed, *saved.replacements):
        if name in known:
            targets[name] = known[name]
        elif name in saved.changed or _has_other_values(saved.tensor(saved.replacements[name]), name, folded):
            raise CheckpointError(
                f"{base.name}: weight {name}, which {saved.path} changes, does not stand in the file as a whole; "
                "the adapters belong to another model, or the exporter folded the weight into something else"
            )
    return targets


def _has_other_values(tensor: torch.Tensor, name: str, folded: Mapping[str, str] | None) -> bool:
    """Whether a tensor that the file does not have as a whole is another one than the file was computed with.

    Tensors that the file does not use are not among ``folded``. Files of earlier versions do not say; there, counters
    such as those of batches are taken for unused.
    """
    if folded is None:
        return tensor.is_floating_point()
    return name in folded and describe_tensor(tensor) != folded[name]


def _assert_same_kind(base: Path, name: str, values: torch.Tensor, old: torch.Tensor) -> None:
    if values.shape != old.shape or values.dtype != old.dtype:
        raise CheckpointError(
            f"{base.name}: {name} has shape {list(old.shape)} and {old.dtype}, the saved one {list(values.shape)} "
            f"and {values.dtype}; the adapters belong to another model"
        )


def _copy_external_data(names: Collection[str], base: Path, draft: Path) -> None:
    """Under names of the new file, so that folding twice in one folder overwrites nothing."""
    if not names:
        return
    wanted: dict[str, str] = {}
    for number, name in enumerate(sorted(names)):
        suffix = name.removeprefix(base.name) if name.startswith(base.name) else "." + Path(name).name
        # Files of one name may lie in different folders.
        wanted[name] = draft.name + (f".{number}" if draft.name + suffix in wanted.values() else "") + suffix
    for name, other in wanted.items():
        shutil.copyfile(base.parent / name, draft.parent / other)
    try:
        model = onnx.load(draft, load_external_data=False)
    except Exception as error:  # protobuf raises types of its own
        raise ExportError(
            f"{base} cannot be read as an ONNX model: {error}; expected a whole file; export the base model again"
        ) from error
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = wanted[entry.value]
    onnx.save(model, draft)
