"""Weights of an ONNX file that are in a file beside it: because they are too large, or while it is worked on.

A file whose weights are beside it is read and written in milliseconds, however large they are.
"""

from __future__ import annotations

import os
from pathlib import Path

import onnx

#: Weights of more bytes stay beside the file: a protobuf message cannot have 2 GB. torch begins at this size too.
LARGEST = 1536 * 2**20


def is_large(path: Path) -> bool:
    """Whether the weights of a file are beside it, because they are too large."""
    beside = _find_beside(path)
    return os.path.isfile(beside) and beside.stat().st_size > LARGEST


def embed_weights(path: Path) -> None:
    """Put the weights into the file, and remove the file beside it; nothing happens if there is none, or a large one.

    Args:
        path: the file; its weights are in a file with ".data" after its name, as torch writes them.
    """
    beside = _find_beside(path)
    if os.path.isfile(beside) and not is_large(path):
        onnx.save(onnx.load(path), path)
        beside.unlink()


def save_model(model: onnx.ModelProto, path: Path) -> None:
    """Write a loaded model, with its weights beside the file if they are too large for it.

    The model is not to be used after that: large weights leave it.
    """
    beside = _find_beside(path)
    if os.path.isfile(beside):
        beside.unlink()  # onnx would append to it
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > LARGEST:
        onnx.save(model, path, save_as_external_data=True, location=beside.name)
    else:
        onnx.save(model, path)


def _find_beside(path: Path) -> Path:
    # Its name may be too long for the file system; os.path.isfile takes that for a file that does not exist.
    return path.with_name(f"{path.name}.data")
