"""Adapters of a folder in another format, without the model's code."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from adapter_compiler.errors import ConfigError
from adapter_compiler.saving.folders.read_folder import read_saved_adapters
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.folders.write_peft import convert_to_peft
from adapter_compiler.saving.primitives.adapter_file import ADAPTERS, FILE_NAME, describe_file
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.quantized_formats import describe_formats

#: Formats that adapters can be converted to.
FORMATS = ("native", "peft-lora", "peft-adalora")


def convert_adapters(folder: str | Path, out: str | Path, *, to: str) -> Path:
    """Write the adapters of ``folder`` to ``out`` in another format.

    Args:
        folder: adapters of this library or of PEFT.
        out: the folder to write.
        to: one of :data:`FORMATS`.

    Raises:
        ConfigError: the format is unknown, or cannot express the adapters.
        CheckpointError: the folder holds no adapters that can be read.
    """
    if to not in FORMATS:
        raise ConfigError(f"to={to!r}: expected one of {', '.join(FORMATS)}")
    saved = read_saved_adapters(folder)
    if to == "native":
        return _write_native(saved, Path(out))
    return convert_to_peft(saved, out, kind=to.removeprefix("peft-"))


def _write_native(saved: SavedAdapters, out: Path) -> Path:
    saved.assert_plain("a converted folder")
    tensors: dict[str, torch.Tensor] = {}
    for name in saved.adapters:
        for key, value in saved.parameters_of(name).items():
            tensors[f"adapters.{name}.{key}"] = value.contiguous().clone()
    tensors |= {f"module.{name}": saved.tensor(key) for name, key in saved.replacements.items()}
    layers = {one.planned.site.weight: one.layer for one in saved.adapters.values() if one.layer}
    header = describe_file(saved.plan, layers=layers, quantized=describe_formats(saved.quantized))
    metadata = ADAPTERS.make_metadata(header, tensors)
    with written_beside(out / FILE_NAME) as draft:
        save_file(tensors, draft, metadata=metadata)
    return out
