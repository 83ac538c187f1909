"""Read what ``torch.distributed.checkpoint`` wrote as data: its metadata is a pickle, which could run code."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from adapter_compiler.errors import CheckpointError

#: The file with the metadata.
METADATA = ".metadata"

#: All that the metadata of tensors consists of, by module; dtypes in addition.
_ALLOWED = {
    "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "torch": {"Size"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        *("ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta"),
        *("TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING"),
    },
    "torch.serialization": {"_get_layout"},
}


class TensorReader(FileSystemReader):
    """A ``FileSystemReader`` for tensors alone, which runs no code of the files."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The metadata, of which every entry is a tensor.

        Raises:
            CheckpointError: the file is missing or damaged, or has anything else in it.
        """
        path = Path(self.path) / METADATA
        try:
            with path.open("rb") as file:
                metadata = _Unpickler(file).load()
        except (OSError, EOFError, pickle.UnpicklingError, AttributeError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(
                f"{path} cannot be read ({error}), expected the metadata of tensors; save the state again"
            ) from error
        entries = getattr(metadata, "state_dict_metadata", {"": None})
        if odd := [name for name, entry in entries.items() if type(entry) is not TensorStorageMetadata]:
            raise CheckpointError(
                f"{path}: {odd[0]!r} is a {type(entries[odd[0]]).__name__}, expected tensors only; save the state again"
            )
        found: Metadata = metadata
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """What the metadata of tensors needs, and nothing else."""
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is no part of the metadata of tensors")
        return super().find_class(module, name)
