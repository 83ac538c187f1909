"""Files are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from adapter_compiler.saving.primitives.files import written_beside, written_folder


def test_what_was_written_replaces_the_file_with_its_companions(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "model.onnx"
    with written_beside(path) as draft:
        assert draft.name == path.name
        assert not path.exists()
        draft.write_text("new")
        draft.with_name("model.onnx.data").write_text("weights")
    assert path.read_text() == "new"
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, failure: type[BaseException]) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(failure), written_beside(path) as draft:
        draft.write_text("half")
        draft.with_name("file.data").write_text("half")
        raise failure
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_block_that_writes_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing was written"), written_beside(tmp_path / "file"):
        pass
    assert list(tmp_path.iterdir()) == []


WRITERS = [written_beside, written_folder]
READ_ONLY = "cannot be written .*, what was there before is as it was; change the permissions of its folder or give"


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_cannot_be_written_is_named(
    write: Callable[..., Any], number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise OSError(number, os.strerror(number), str(tmp_path / ".new.draft"))

    monkeypatch.setattr("adapter_compiler.saving.primitives.files.tempfile.mkdtemp", refuse)
    with pytest.raises(OSError, match=f"new {READ_ONLY}") as caught, write(tmp_path / "new"):
        pass
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="nothing stops root")
@pytest.mark.parametrize("write", WRITERS)
def test_a_read_only_folder_is_named(write: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o500)
    with pytest.raises(PermissionError, match=f"new {READ_ONLY}"), write(folder / "new"):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "failure",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_is_named(write: Callable[..., Any], failure: Exception, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"new cannot be written .*; free some space") as caught, write(tmp_path / "new"):
        raise failure
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.__cause__ is failure
    assert list(tmp_path.iterdir()) == []


def test_a_failure_to_take_the_place_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    path = tmp_path / "file"
    path.write_text("old")
    monkeypatch.setattr("adapter_compiler.saving.primitives.files.os.replace", refuse)
    with pytest.raises(PermissionError, match=f"file {READ_ONLY}"), written_beside(path) as draft:
        draft.write_text("new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_errors_about_other_files_keep_their_words(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="none"), written_beside(tmp_path / "new"):
        (tmp_path / "none").read_text()
    unreadable = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "base"))
    with pytest.raises(PermissionError) as caught, written_beside(tmp_path / "new"):
        raise unreadable
    assert caught.value is unreadable


def test_a_new_companion_does_not_stay_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target) == tmp_path / "model.onnx":
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr("adapter_compiler.saving.primitives.files.os.replace", refuse)
    with pytest.raises(PermissionError), written_beside(tmp_path / "model.onnx") as draft:
        draft.write_text("new")
        draft.with_name("model.onnx.data").write_text("new")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("failing", range(5))
def test_companions_are_exchanged_together_or_not_at_all(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the four moves fails; and at no moment does the file stand beside companions of another one."""
    path, beside = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    path.write_text("old")
    beside.write_text("old")
    calls, replace = [0], os.replace

    def watch(source: Path, target: Path) -> None:
        assert not path.exists() or path.read_text() == beside.read_text()
        calls[0] += 1
        if calls[0] == failing + 1:
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr("adapter_compiler.saving.primitives.files.os.replace", watch)
    fails = failing < 4
    with pytest.raises(PermissionError) if fails else contextlib.nullcontext(), written_beside(path) as draft:
        draft.write_text("new")
        draft.with_name("model.onnx.data").write_text("new")
    assert [file.read_text() for file in (path, beside)] == ["old" if fails else "new"] * 2
    assert sorted(tmp_path.iterdir()) == [path, beside]
