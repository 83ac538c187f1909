"""Check paths before anything is opened: regular files only, and names in files that stay inside their folder."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path, PurePosixPath, PureWindowsPath

from passes.planning.json_schema import Source, is_text, show


def open_file(source: Source, path: Path) -> io.BufferedReader:
    """Open a file to read its bytes.

    Raises:
        Exception: ``source.error``: it does not exist, cannot be read, or is no regular file. A pipe or a device would
            let the reader wait or never end.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            source.fail("this is no regular file, expected one")
        return path.open("rb")
    except FileNotFoundError as error:
        source.fail("this file does not exist, expected one to read", error)
    except (OSError, ValueError) as error:
        source.fail(f"this file cannot be read ({error}), expected one that can", error)


def read_file_bytes(source: Source, path: Path, largest: int) -> bytes:
    """All bytes of a file, of which there must be no more than ``largest``.

    Raises:
        Exception: ``source.error``: as :func:`open_file`, or the file is larger.
    """
    with open_file(source, path) as file:
        # As many bytes as are asked for are allocated. One more than there are: the file may have grown by now.
        largest = min(largest, os.fstat(file.fileno()).st_size)
        data = file.read(largest + 1)
    if len(data) > largest:
        source.fail(f"this file has more than {largest:,} bytes, expected fewer")
    return data


def find_inside(source: Source, field: str, folder: Path, name: object) -> Path:
    """The path of a file that another file names, which must be in its folder or below.

    Links are followed, and must end inside as well. The one exception is the layout of Hugging Face's cache, where the
    files of ``<model>/snapshots/<revision>`` are links to ``<model>/blobs``.

    Args:
        source: the file that holds the name.
        field: where in it the name stands, for messages.
        folder: where it must stay.
        name: what stands there, of whatever type.

    Raises:
        Exception: ``source.error``: it is no relative path, or one that leads out of the folder.
    """
    if not is_text(name) or "\0" in str(name):
        source.refuse(field, name, "the name of a file in the same folder")
    text = str(name)
    parts = [*PurePosixPath(text).parts, *PureWindowsPath(text).parts]
    if ".." in parts or PurePosixPath(text).is_absolute() or PureWindowsPath(text).anchor or not parts:
        source.refuse(field, name, "the name of a file in the same folder, without '..' and not absolute")
    path = folder / text
    try:
        target = path.resolve()
        allowed = _find_roots(folder.resolve())
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, names that are too long
        source.fail(f"{field} is {show(name)}, which cannot be followed ({error}), expected a file there", error)
    if not any(target.is_relative_to(root) for root in allowed):
        source.fail(f"{field} is {show(name)}, a link to {target}, expected a file that is inside {folder}")
    return path


def _find_roots(folder: Path) -> list[Path]:
    """Where files of a folder may be."""
    is_snapshot = folder.parent.name == "snapshots"
    return [folder, folder.parent.parent / "blobs"] if is_snapshot else [folder]
