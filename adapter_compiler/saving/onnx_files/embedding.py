"""Put the weights of an ONNX file, which are in a file beside it while it is worked on, into the file itself.

A file whose weights are beside it is read and written in milliseconds, however large they are.
"""

from __future__ import annotations

from pathlib import Path

import onnx

#: Weights of more bytes stay beside the file: a protobuf message cannot have 2 GB. torch begins at this size too.
LARGEST = 1536 * 2**20


def embed_weights(path: Path) -> None:
    """Put the weights into the file, and remove the file beside it; nothing happens if there is none.

    Args:
        path: the file; its weights are in a file with ".data" after its name, as torch writes them.
    """
    beside = path.with_name(f"{path.name}.data")
    if beside.is_file() and beside.stat().st_size <= LARGEST:
        onnx.save(onnx.load(path), path)
        beside.unlink()
