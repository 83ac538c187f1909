"""Read a folder of adapters, whoever wrote it."""

from __future__ import annotations

from pathlib import Path

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.peft_format.config import PEFT_CONFIG
from adapter_compiler.saving.folders.read_own import read_own_adapters
from adapter_compiler.saving.folders.read_peft import read_peft_adapters
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.primitives.adapter_file import FILE_NAME


def read_saved_adapters(folder: str | Path) -> SavedAdapters:
    """Look into a folder; nothing but headers is read.

    Args:
        folder: what ``AdaptedModel.save`` or PEFT's ``save_pretrained`` wrote.

    Raises:
        CheckpointError: it holds no adapters, or such that cannot be expressed as one ΔW a weight.
    """
    folder = Path(folder)
    if (folder / FILE_NAME).is_file():
        return read_own_adapters(folder / FILE_NAME)
    if (folder / PEFT_CONFIG).is_file():
        return read_peft_adapters(folder)
    raise CheckpointError(
        f"{folder} holds no adapters; expected {FILE_NAME} (AdaptedModel.save) or {PEFT_CONFIG} (PEFT)"
    )
