"""Write files whole or not at all, and clear away what killed processes left of it.

What is being written lies in a hidden folder beside its place, the draft:

    .<name>.<machine>-<random>/lock    held by flock as long as the writer lives, whatever way it ends
                               new/    what the block writes
                               old/    files that are being exchanged for new ones, for as long as that takes

A later write to the same place removes the drafts of this machine whose lock nobody holds: the kernel drops the lock
of a process however it ends, and sees those of other containers too. Drafts of other machines on a shared file system
stay, since their locks are not always seen from here, and so do those of other users, and all where there is no flock
(Windows, some network file systems): they are removed by hand. Two machines of one name that write to one place on a
file system whose locks are local to each are not distinguished.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import platform
import re
import shutil
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

if sys.platform != "win32":
    import fcntl

logger = logging.getLogger(__name__)

_LOCK, _NEW, _OLD = "lock", "new", "old"
#: Stands in a draft whose writer could not lock it, so that nobody takes it for abandoned.
_UNLOCKED = "unlocked"
#: Part of the names of this machine's drafts. Not the process's number: that means little in another container.
_MACHINE = f"{zlib.crc32(platform.node().encode()):08x}"
_RANDOM = re.compile("[a-z0-9_]+")
#: Bytes of a name that drafts are called by; file systems take 255 in all.
_LONGEST = 200

_NO_ROOM = "free some space or give another place"
_NO_ACCESS = "change the permissions of its folder or give another place"
#: What to do about errors that the place to write causes.
_ADVICE = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), _NO_ROOM),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), _NO_ACCESS),
}
#: How libraries written in Rust spell an error of the system.
_OS_ERROR = re.compile(r"\(os error (\d+)\)")


@contextlib.contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """Yield a path in a new folder beside ``path``; when the block succeeds, what was written there replaces it.

    Every file that the block leaves in that folder moves next to ``path`` (an ONNX file may bring its
    external data), the one named like ``path`` last. If the block raises, the folder is removed and
    ``path`` is as it was. If the process is killed, the hidden folder stays until the next write to ``path``; ``path``
    is the old file or the new one, or absent while its companions are exchanged, but never an old file with new
    companions. If it is absent, the old files are in ``old`` in the hidden folder, until a write has succeeded.

    Raises:
        FileNotFoundError: the block wrote no file named like ``path``.
        OSError: the folder of ``path`` cannot be made or written, or ``path`` is a folder itself.
    """
    path = Path(path)
    _assert_writable_name(path)
    with _explained(path), _folder_beside(path) as folder:
        draft = folder / path.name
        yield draft
        if not draft.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        _move_in(sorted(folder.iterdir(), key=lambda file: file == draft), path.parent, folder.with_name(_OLD))


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
        draft = parent / path.name
        draft.mkdir()
        yield draft
        for written in draft.rglob("*"):
            if written.is_file():
                _flush_to_disk(written)
        os.replace(draft, path)


@contextlib.contextmanager
def _folder_beside(path: Path) -> Iterator[Path]:
    """A new folder in a draft of ``path``; drafts that killed processes left are removed, before and after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Those that hold files which had to make room wait: if this write fails, they are all that is left of these.
    _remove_abandoned(path, with_old=False)
    with contextlib.ExitStack() as stack:
        yield _make_draft(path, stack)
    _remove_abandoned(path, with_old=True)


def _make_draft(path: Path, stack: contextlib.ExitStack) -> Path:
    """The folder to write to in a new draft, which is this process's own until the stack is closed."""
    while True:
        # What another process's look at the lock keeps from being removed here, the next write removes.
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=_prefix(path), ignore_cleanup_errors=True)
        draft = Path(stack.enter_context(folder))
        try:
            _hold(draft, stack)
            (draft / _NEW).mkdir()
        except FileNotFoundError:
            continue  # removed as abandoned before it was locked
        return draft / _NEW


def _prefix(path: Path) -> str:
    return f"{_stem(path)}{_MACHINE}-"


def _stem(path: Path) -> str:
    """What the names of all drafts of ``path`` begin with: its name, as far as there is room for it."""
    name, encoded = path.name, os.fsencode(path.name)
    if len(encoded) > _LONGEST:
        name = f"{encoded[:_LONGEST].decode('utf-8', 'ignore')}-{zlib.crc32(encoded):08x}"
    return f".{name}."


def _hold(draft: Path, stack: contextlib.ExitStack) -> None:
    """Lock a draft until the stack is closed.

    Raises:
        FileNotFoundError: somebody has removed the draft, or is about to.
    """
    lock = _open_lock(draft)
    stack.callback(os.close, lock)
    is_locked = _try_lock(lock)
    if is_locked is None:
        (draft / _UNLOCKED).touch()
    elif not is_locked or not (draft / _LOCK).exists():
        raise FileNotFoundError(draft)


def _open_lock(draft: Path) -> int:
    return os.open(draft / _LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)


def _try_lock(lock: int) -> bool | None:
    """Whether the lock is now held by this process; ``None`` where there are no locks."""
    if sys.platform == "win32":
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        logger.debug("no locks here (%s)", error)
        return None
    return True


def _remove_abandoned(path: Path, *, with_old: bool) -> None:
    """Remove the drafts of ``path`` that this machine made and nobody writes any more, those with old files or not."""
    prefix = _prefix(path)
    try:
        names = [name for name in os.listdir(path.parent) if name.startswith(prefix)]
    except OSError as error:  # as of a folder that may be written but not read
        logger.debug("drafts that were left in %s cannot be looked for (%s)", path.parent, error)
        return
    for name in names:
        draft = path.parent / name
        if _RANDOM.fullmatch(name.removeprefix(prefix)) and not draft.is_symlink():
            _remove_if_abandoned(draft, with_old=with_old)


def _remove_if_abandoned(draft: Path, *, with_old: bool) -> None:
    """Remove a draft unless its writer lives; whoever makes one looks whether it still is there once it is locked."""
    try:
        lock = _open_lock(draft)
    except OSError as error:  # removed by another process just now, or somebody else's
        logger.debug("%s is left alone (%s)", draft, error)
        return
    try:
        if not _try_lock(lock) or (draft / _UNLOCKED).exists() or ((draft / _OLD).exists() and not with_old):
            return
        shutil.rmtree(draft, ignore_errors=True)
    finally:
        os.close(lock)
    try:
        # Network file systems keep an open file under another name until now. Only if it is empty: the lock is free.
        draft.rmdir()
    except FileNotFoundError:
        return
    except OSError as error:
        logger.warning(
            "%s was left by a process that was killed and cannot be removed (%s); do it by hand", draft, error
        )


def _move_in(written: Sequence[Path], folder: Path, kept: Path) -> None:
    """Give files their places in ``folder``, all or none; the last one is the file that refers to the others.

    Args:
        written: the files.
        folder: where they go.
        kept: a folder to make, for those that are there now.
    """
    for file in written:
        _flush_to_disk(file)
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        if len(written) > 1:
            kept.mkdir()
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
        foreign = _OS_ERROR.search(str(error))
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
    return not found or any(_stem(path) in str(name) or name in (path, *path.parents) for name in found)


def _assert_writable_name(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file to write; add one to it")
    for parent in path.parents:
        if parent.exists() and not parent.is_dir():
            raise NotADirectoryError(f"{parent} is a file, expected a folder to write {path.name} in; give another one")


def _flush_to_disk(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())
