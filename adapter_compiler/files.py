"""Write files whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_NO_ROOM = "free some space or give another place"
_NO_ACCESS = "change the permissions of its folder or give another place"
#: What to do about errors that the place to write causes.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_ACCESS),
}
#: How libraries written in Rust spell an error of the system.
_FOREIGN = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yield a path in a new folder beside ``path``; when the block succeeds, what was written there replaces it.

    Every file that the block leaves in that folder moves next to ``path`` (an ONNX file may bring its
    external data), the one named like ``path`` last. If the block raises, the folder is removed and
    ``path`` is as it was. If the process is killed, the hidden folder stays; ``path`` is the old file or the new
    one, or absent while its companions are exchanged, but never an old file with new companions.

    Raises:
        FileNotFoundError: the block wrote no file named like ``path``.
        OSError: the folder of ``path`` cannot be made or written, or ``path`` is a folder itself.
    """
    path = Path(path)
    _assert_writable_name(path)
    with _explained(path), _folder_beside(path) as folder:
        draft = Path(folder) / path.name
        yield draft
        if not draft.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        _move_in(sorted(Path(folder).iterdir(), key=lambda file: file == draft), path.parent)


@contextlib.contextmanager
def written_folder(path: str | Path) -> Iterator[Path]:
    """Yield a new folder beside ``path``; when the block succeeds, it becomes ``path``.

    If the block raises, the new folder is removed.

    Raises:
        FileExistsError: ``path`` exists and is not an empty folder.
        OSError: the folder of ``path`` cannot be written.
    """
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(f"{path} exists and is not empty; name another folder or remove it")
    with _explained(path), _folder_beside(path) as parent:
        draft = Path(parent) / path.name
        draft.mkdir()
        yield draft
        for written in draft.iterdir():
            _flush_to_disk(written)
        os.replace(draft, path)


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        yield folder


def _move_in(written: Sequence[Path], folder: Path) -> None:
    """Give files their places in ``folder``, all or none; the last one is the file that refers to the others."""
    for file in written:
        _flush_to_disk(file)
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        if len(written) > 1:
            kept = Path(tempfile.mkdtemp(dir=written[0].parent))
            for place in (folder / file.name for file in reversed(written)):
                if place.exists():
                    os.replace(place, kept / place.name)
                    aside.append((kept / place.name, place))
        for file in written:
            os.replace(file, folder / file.name)
            placed.append(folder / file.name)
    except BaseException:
        for place in placed:
            place.unlink()
        for kept_file, place in reversed(aside):
            os.replace(kept_file, place)
        raise


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    """Let an error of the place to write name the file and say what to do, whichever library met it."""
    try:
        yield
    except Exception as error:
        foreign = _FOREIGN.search(str(error))
        number = int(foreign[1]) if foreign else error.errno if isinstance(error, OSError) else None
        if number not in _ADVICE or not _concerns(error, path):
            raise
        reason = os.strerror(number)
        message = f"{path} cannot be written ({reason}), what was there before is as it was; {_ADVICE[number]}"
        raise OSError(number, message) from error


def _concerns(error: Exception, path: Path) -> bool:
    """Whether an error is about the place to write, and not about a file that was to be read."""
    names = [getattr(error, attribute, None) for attribute in ("filename", "filename2")]
    found = [Path(name) for name in names if isinstance(name, (str, os.PathLike))]
    return not found or any(f".{path.name}." in str(name) or name in (path, *path.parents) for name in found)


def _assert_writable_name(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file to write; add one to it")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file, expected a folder to write {path.name} in; give another one")


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
