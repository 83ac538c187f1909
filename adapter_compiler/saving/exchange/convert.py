"""Adapters of a folder in another format, without the model's code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.exchange.base_config import read_base_config
from adapter_compiler.saving.exchange.manifest import find_manifest, write_manifest
from adapter_compiler.saving.exchange.targets import diffusers, gguf, lora_folder, mlx, ort
from adapter_compiler.saving.exchange.updates import EVERYTHING, WeightUpdate, find_updates
from adapter_compiler.saving.folders.peft_format.notes import PEFT_WEIGHTS
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.folders.write_peft import convert_to_peft
from adapter_compiler.saving.primitives.adapter_file import ADAPTERS, FILE_NAME, describe_file
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.quantized_formats import describe_formats

#: Formats that adapters can be converted to.
FORMATS = ("native", "peft", "peft-lora", "peft-adalora", "lora", "vllm", "gguf", "mlx", "diffusers", "ort")

_ABILITIES = {
    "lora": lora_folder.LORA,
    "vllm": lora_folder.VLLM,
    "gguf": gguf.ABILITIES,
    "mlx": mlx.ABILITIES,
    "diffusers": diffusers.ABILITIES,
    "ort": ort.ABILITIES,
}
#: Formats that are one file, and the main file of those that are folders.
_FILES = ("gguf", "ort")
_MAIN_FILES = {
    "lora": PEFT_WEIGHTS,
    "vllm": PEFT_WEIGHTS,
    "mlx": mlx.WEIGHTS,
    "diffusers": diffusers.WEIGHTS,
}


def convert_adapters(
    folder: str | Path, out: str | Path, *, to: str, base: str | Path | None = None, component: str | None = None
) -> Path:
    """Write the adapters of ``folder`` to ``out`` in another format, with a manifest beside them.

    Each format has its own rule of scales and ranks, which is the one that is written for:

        ============  =============================  ======================================================
        to            out                            rule
        ============  =============================  ======================================================
        native        folder                         this library's: all of it
        peft          folder                         alpha / r by weight; the same as ``peft-lora``
        peft-adalora  folder                         P, λ and Q, padded to one rank
        lora          folder in PEFT's layout        one rank and alpha, scale 1, no patterns
        vllm          folder in PEFT's layout        one rank and alpha, scale 1; linear layers only
        gguf          file                           llama.cpp's: alpha 0, so scale 1; own ranks
        mlx           folder                         mlx-lm's: one rank and scale 1
        diffusers     folder                         one rank, scale 1; names below a pipeline's part
        ort           file                           onnxruntime's inputs of a file; own ranks
        ============  =============================  ======================================================

    Args:
        folder: adapters of this library or of PEFT.
        out: what to write: a folder, or a file for ``gguf`` and ``ort``.
        to: one of :data:`FORMATS`.
        base: the base model: for ``gguf`` and ``mlx`` the folder with its ``config.json``, for ``ort`` the file that
            was exported with ``adapters="runtime"``.
        component: for ``diffusers`` the part of the pipeline, such as ``unet``.

    Raises:
        ConfigError: the format is unknown, or cannot express the adapters; the weight is named.
        CheckpointError: the folder holds no adapters that can be read.
    """
    if to not in FORMATS:
        raise ConfigError(f"to={to!r}: expected one of {', '.join(FORMATS)}")
    saved, out = read_saved_adapters(folder), Path(out)
    if to == "native":
        return _write_native(saved, out)
    if to.startswith("peft"):
        return _write_peft(saved, out, to)
    _assert_elsewhere(Path(folder), out)
    updates = find_updates(saved, _ABILITIES[to])
    with _written(out, to) as draft:
        dtype = _write(updates, draft, saved, to, base, component)
        adds_only = not saved.replacements
        path = find_manifest(draft)
        write_manifest(path, updates, target=to, component=component, adds_only=adds_only, dtype=dtype)
    return out


@contextlib.contextmanager
def _written(out: Path, to: str) -> Iterator[Path]:
    """A place to write to, whose files move to ``out`` together; if something fails, no new folder stays."""
    is_new = not out.exists()
    try:
        with written_beside(out if to in _FILES else out / _MAIN_FILES[to]) as draft:
            yield draft if to in _FILES else draft.parent
    except BaseException:
        if is_new and out.is_dir():
            with contextlib.suppress(OSError):  # another process may have written there meanwhile
                out.rmdir()
        raise


def _write(
    updates: Sequence[WeightUpdate],
    draft: Path,
    saved: SavedAdapters,
    to: str,
    base: str | Path | None,
    component: str | None,
) -> torch.dtype:
    """Write the adapter, and return the dtype of its tensors."""
    if to == "gguf":
        gguf.write_gguf(updates, draft, read_base_config(base, "llama.cpp"))
    elif to == "mlx":
        mlx.write_mlx(updates, draft, read_base_config(base, "mlx-lm"))
    elif to == "diffusers":
        diffusers.write_diffusers(updates, draft, component)
    elif to == "ort":
        return ort.write_ort(updates, draft, saved, base)
    else:
        lora_folder.write_lora(saved, draft)
    return torch.float32


def _write_peft(saved: SavedAdapters, out: Path, to: str) -> Path:
    convert_to_peft(saved, out, kind=to.removeprefix("peft").removeprefix("-") or "lora")
    with written_beside(find_manifest(out)) as draft:
        write_manifest(draft, find_updates(saved, EVERYTHING), target=to, adds_only=not saved.replacements)
    return out


def _assert_elsewhere(folder: Path, out: Path) -> None:
    if out.resolve() == folder.resolve():
        raise ConfigError(f"{out} is the folder that is converted, expected another one; name another")


def _write_native(saved: SavedAdapters, out: Path) -> Path:
    saved.assert_plain("a converted folder")
    tensors: dict[str, torch.Tensor] = {}
    for name in saved.adapters:
        for key, value in saved.parameters_of(name).items():
            tensors[f"adapters.{name}.{key}"] = value.contiguous().clone()
    tensors |= {f"module.{name}": saved.tensor(key) for name, key in saved.replacements.items()}
    layers = {one.planned.site.weight: one.layer for one in saved.adapters.values() if one.layer}
    trained = {} if saved.trained is None else saved.trained.describe()
    quantized = describe_formats(saved.quantized)
    header = describe_file(saved.plan, layers=layers, quantized=quantized, trained=trained)
    metadata = ADAPTERS.make_metadata(header, tensors)
    with written_beside(out / FILE_NAME) as draft:
        save_file(tensors, draft, metadata=metadata)
    return out
