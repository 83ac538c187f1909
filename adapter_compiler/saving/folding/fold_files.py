"""Fold saved adapters into a base file: a safetensors checkpoint, a folder with one, or an exported ONNX file."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from adapter_compiler.config.progress import progress as tell_progress
from adapter_compiler.config.progress import tell
from adapter_compiler.errors import CheckpointError, ConfigError
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.folding.base_checkpoint import INDEX_SUFFIX
from adapter_compiler.saving.folding.fold_onnx import fold_onnx
from adapter_compiler.saving.folding.fold_safetensors import Progress, fold_safetensors
from adapter_compiler.saving.primitives.files import written_beside, written_folder
from adapter_compiler.saving.primitives.json_files import read_json_file
from adapter_compiler.saving.primitives.paths import find_inside
from passes.planning.json_schema import Source

_CONFIG = "config.json"

_WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".onnx", ".data", ".gguf")


#: What adapters may be added to if they were trained over quantized weights.
BASE_WEIGHTS = ("trained", "given")


def fold_files(
    base: str | Path,
    adapters: str | Path,
    out: str | Path,
    *,
    progress: Progress | None = None,
    base_weights: str = "trained",
) -> list[str]:
    """Merge trained adapters into a base file, streaming, without the model's code.

    The result is bit for bit that of folding in PyTorch. Memory holds the largest weight and what its sum
    takes, whatever the size of the model.

    Args:
        base: a ``.safetensors`` file, an index of shards, a folder with either (its other files are copied
            too), or an ``.onnx`` file that :func:`~adapter_compiler.export_onnx` wrote of the base model.
        adapters: a folder from ``AdaptedModel.save``, or of PEFT.
        out: what to write: a file, or for a folder or a sharded checkpoint a folder.
        progress: called after each weight, in place of what :func:`~adapter_compiler.set_progress` chose.
        base_weights: what to do about weights that were quantized while the adapters were trained, if the folder says
            so. ``"trained"`` quantizes those of the base in the same way and unpacks them, so that the result is that
            of ``AdaptedModel.fold``: the updates correct the errors of these values. ``"given"`` adds the updates to
            the weights of the base as they are, which is another model. Folders that PEFT wrote do not say how the
            base was quantized, so that both give the same.

    Returns:
        Names of the tensors that were changed or added.

    Raises:
        CheckpointError: a file is missing or damaged, or base and adapters do not belong together.
        ExportError: the ONNX file is damaged, or lacks the map of its weights.
        ConfigError: ``out`` is ``base``, or of another kind; or ``base_weights`` is unknown.
    """
    if base_weights not in BASE_WEIGHTS:
        raise ConfigError(f"base_weights={base_weights!r}: expected one of {', '.join(map(repr, BASE_WEIGHTS))}")
    base, out = Path(base), Path(out)
    if out.exists() and base.exists() and out.samefile(base):
        raise ConfigError(f"out={out} is the base itself; give another place")
    saved = read_saved_adapters(adapters)
    if base_weights == "given":
        saved = saved.without_formats()
    if progress is not None:
        return _fold(base, saved, out, progress)
    with tell_progress(f"fold into {base.name}"):
        return _fold(base, saved, out, tell)


def _fold(base: Path, saved: SavedAdapters, out: Path, progress: Progress) -> list[str]:
    file = _find_checkpoint(base)
    if file.suffix == ".onnx":
        with written_beside(out) as draft:
            return fold_onnx(file, saved, draft, progress)
    config = _read_config(file.parent / _CONFIG)
    if base.is_dir() or file.name.endswith(INDEX_SUFFIX):
        if out.suffix == ".safetensors" or out.is_file():
            raise ConfigError(f"out={out}: {base} is written as a folder; name one")
        with written_folder(out) as folder:
            _copy_other_files(base if base.is_dir() else base.parent, folder)
            return fold_safetensors(file, saved, folder / file.name, progress, config=config, can_untie=True)
    with written_beside(out) as draft:
        return fold_safetensors(file, saved, draft, progress, config=config)


def _read_config(path: Path) -> dict[str, Any] | None:
    """What transformers' configuration of the model says, if it is there."""
    if not path.exists():
        return None
    return read_json_file(path, {}, advice="fetch or save the model again", allow_unknown=True)


def _find_checkpoint(base: Path) -> Path:
    if base.is_file():
        if base.suffix in (".safetensors", ".onnx") or base.name.endswith(INDEX_SUFFIX):
            return base
        raise CheckpointError(f"{base}: expected a .safetensors, {INDEX_SUFFIX} or .onnx file, or a folder")
    if not base.is_dir():
        raise CheckpointError(f"{base} does not exist; expected a .safetensors or .onnx file, or a folder")
    found = sorted(base.glob("*" + INDEX_SUFFIX)) or sorted(base.glob("*.safetensors"))
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(f"{base}: expected one safetensors checkpoint, found {names}; name the file itself")
    return found[0]


def _copy_other_files(source: Path, folder: Path) -> None:
    """Copy the configuration and the tokenizer, not the weights. A link that leads out of the folder is refused."""
    messages = Source(name=str(source), error=CheckpointError, advice="put a copy in place of the link")
    for path in sorted(source.iterdir()):
        if path.is_file() and not path.name.endswith((*_WEIGHT_SUFFIXES, INDEX_SUFFIX)):
            find_inside(messages, "a file to copy", source, path.name)
            shutil.copyfile(path, folder / path.name)
