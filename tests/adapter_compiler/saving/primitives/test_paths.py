"""Paths in files stay inside their folder, and only regular files are opened."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.primitives.paths import find_inside, open_file, read_file_bytes
from passes.planning.json_schema import Source

SOURCE = Source(name="the index", error=CheckpointError, advice="fetch it again")


def find(folder: Path, name: Any) -> Path:
    return find_inside(SOURCE, "weight_map: w", folder, name)


@pytest.mark.parametrize("name", ["a", "a.safetensors", "b/a", "./b/./a", "..a", "a..b/c...", "not there"])
def test_what_is_inside_is_found(name: str, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    for file in ("a", "b/a"):
        (tmp_path / file).touch()
    assert find(tmp_path, name) == tmp_path / name


OUTSIDE = [
    "..",
    "../a",
    "b/../../a",
    "b/..",
    "/etc/passwd",
    "C:\\a",
    "C:a",
    "\\\\host\\a",
    "..\\a",
    "b\\..\\..\\a",
    ".",
]


@pytest.mark.parametrize("name", [*OUTSIDE, "", "a\0b", "\ud800", None, 3, ["a"], {"a": 1}])
def test_what_leads_outside_or_is_no_name_is_refused(name: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"the index: weight_map: w is .*, expected the name of a file in the sa"):
        find(tmp_path, name)


def test_a_name_that_is_too_long_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be followed|cannot be read"):
        open_file(SOURCE, find(tmp_path, "a" * 5000))


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_may_stay_inside_only(tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", tmp_path / "other"
    for one in (folder, other):
        one.mkdir()
        (one / "a").touch()
    links = {"inside": folder / "a", "outside": other / "a", "up": tmp_path, "twice": folder / "outside"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    assert find(folder, "inside") == folder / "inside"
    for name in ("outside", "twice", "up/other/a"):
        with pytest.raises(CheckpointError, match=r"is '.*', a link to .*, expected a file that is inside"):
            find(folder, name)
    (folder / "round").symlink_to(folder / "round")
    with pytest.raises(CheckpointError, match="cannot be followed"):
        open_file(SOURCE, find(folder, "round"))
    (tmp_path / "alias").symlink_to(folder)
    assert find(tmp_path / "alias", "inside") == tmp_path / "alias" / "inside"


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_the_cache_of_hugging_face_keeps_files_beside_the_snapshot(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "models--a" / "snapshots" / "1234", tmp_path / "models--a" / "blobs"
    for folder in (snapshot, blobs):
        folder.mkdir(parents=True)
    (blobs / "f00").touch()
    (tmp_path / "secret").touch()
    (snapshot / "a").symlink_to(Path("..") / ".." / "blobs" / "f00")
    (snapshot / "b").symlink_to(tmp_path / "secret")
    (blobs / "away").symlink_to(tmp_path / "secret")
    (snapshot / "c").symlink_to(blobs / "away")
    assert find(snapshot, "a") == snapshot / "a"
    for name in ("b", "c"):
        with pytest.raises(CheckpointError, match="a link to"):
            find(snapshot, name)


def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="this file does not exist"):
        open_file(SOURCE, tmp_path / "none")
    with pytest.raises(CheckpointError, match="this is no regular file"):
        open_file(SOURCE, tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_file(SOURCE, tmp_path / "a\0b")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_pipe_does_not_let_the_reader_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="this is no regular file"):
        open_file(SOURCE, tmp_path / "pipe")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "large").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match="has more than 1,000 bytes"):
        read_file_bytes(SOURCE, tmp_path / "large", 1000)
    with (tmp_path / "large").open("wb") as file:
        file.write(b"x" * 1000)
    assert len(read_file_bytes(SOURCE, tmp_path / "large", 1000)) == 1000
