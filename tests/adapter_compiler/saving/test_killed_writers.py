"""What killed processes leave is cleared away by the next write to the same place; what living ones write is not."""

from __future__ import annotations

import errno
import itertools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapter_compiler.saving.primitives import files
from adapter_compiler.saving.primitives.files import written_beside, written_folder

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL and no flock")

#: The module by itself, so that a process starts in no time.
SETUP = f"""
import importlib.util, os, signal, sys, time
from pathlib import Path
spec = importlib.util.spec_from_file_location("files", {str(files.__file__)!r})
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
place = Path(sys.argv[1])
def write(text, wait=lambda: None):
    with files.written_beside(place) as draft:
        draft.write_text(text)
        draft.with_name(place.name + ".data").write_text(text)
        wait()
"""

#: Dies at the n-th call that changes something on the disk.
DIE_AT = """
import fcntl, tempfile
count = 0
def deadly(function):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
for module, names in ((os, ("open", "mkdir", "replace", "fsync", "rmdir", "unlink", "close")), (fcntl, ("flock",))):
    for name in names:
        setattr(module, name, deadly(getattr(module, name)))
write("new")
"""

WAIT = """
write("slow", wait=lambda: (print("ready", flush=True), sys.stdin.readline()))
print("done", flush=True)
"""

WRITE_FOREVER = """
print("ready", flush=True)
for number in range(10**9):
    with files.written_beside(place) as draft:
        draft.write_text(f"{os.getpid()} {number}")
"""


def run(code: str, *arguments: object) -> int:
    command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
    return subprocess.run(command, check=False, timeout=60).returncode


Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts writers, and waits until they write; those that are left end with the test."""
    started: list[subprocess.Popen[str]] = []

    def start_one(code: str, *arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SETUP + code, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        output = started[-1].stdout
        assert output is not None
        assert output.readline() == "ready\n"
        return started[-1]

    yield start_one
    for process in started:
        if process.poll() is None:
            process.kill()
            process.communicate()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def write(place: Path, text: str) -> None:
    with written_beside(place) as draft:
        draft.write_text(text)


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def test_whenever_a_writer_is_killed_the_next_write_leaves_nothing_of_it(tmp_path: Path) -> None:
    place, beside = tmp_path / "model", tmp_path / "model.data"
    drafts = 0
    for number in range(1, 100):
        place.write_text("old")
        beside.write_text("old")
        status = run(DIE_AT, place, number)
        if status == 0:
            break
        assert status == -signal.SIGKILL
        assert not place.exists() or place.read_text() == beside.read_text()
        drafts += len(hidden(tmp_path))
        write(place, "next")
        assert place.read_text() == "next"
        assert hidden(tmp_path) == []
    else:
        pytest.fail("the writer never gets to its end")
    assert number > 15
    assert drafts > 10


def test_what_had_to_make_room_stays_until_a_write_has_succeeded(tmp_path: Path) -> None:
    place, beside = tmp_path / "model", tmp_path / "model.data"
    place.write_text("old")
    beside.write_text("old")
    for number in itertools.count(10):
        assert run(DIE_AT, place, number) == -signal.SIGKILL
        if not place.exists():
            break
        write(place, "old")
    (draft,) = hidden(tmp_path)
    with pytest.raises(RuntimeError), written_beside(place):
        raise RuntimeError
    assert (draft / "old" / "model").read_text() == "old"
    write(place, "next")
    assert hidden(tmp_path) == []


def test_a_living_writer_keeps_its_draft(start: Start, tmp_path: Path) -> None:
    place = tmp_path / "model"
    living, killed = start(WAIT, place), start(WAIT, place)
    kill(killed)
    assert len(hidden(tmp_path)) == 2
    write(place, "quick")
    assert place.read_text() == "quick"
    assert len(hidden(tmp_path)) == 1
    output, _ = living.communicate("\n")
    assert (living.returncode, output) == (0, "done\n")
    assert place.read_text() == "slow"
    assert hidden(tmp_path) == []


def test_a_draft_in_the_same_process_is_a_living_one(tmp_path: Path) -> None:
    place = tmp_path / "model"
    with written_beside(place) as draft:
        thread = threading.Thread(target=write, args=(place, "inner"))
        thread.start()
        thread.join()
        draft.write_text("outer")
    assert place.read_text() == "outer"
    assert hidden(tmp_path) == []


def test_a_killed_writer_of_a_folder_leaves_nothing_either(tmp_path: Path) -> None:
    code = """
with files.written_folder(place) as draft:
    (draft / "shard").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    assert run(code, tmp_path / "out") == -signal.SIGKILL
    assert len(hidden(tmp_path)) == 1
    with written_folder(tmp_path / "out") as draft:
        assert hidden(tmp_path) == [draft.parents[1]]
        (draft / "shard").write_text("whole")
    assert (tmp_path / "out" / "shard").read_text() == "whole"
    assert hidden(tmp_path) == []


def test_writers_that_come_and_are_killed_do_not_disturb_each_other(start: Start, tmp_path: Path) -> None:
    """Four processes write one place as fast as they can; all but one are killed and replaced again and again."""
    place = tmp_path / "model"
    dice = random.Random(0)
    steady = start(WRITE_FOREVER, place)
    others = [start(WRITE_FOREVER, place) for _ in range(3)]
    for _ in range(6):
        killed = others.pop(dice.randrange(len(others)))
        kill(killed)
        others.append(start(WRITE_FOREVER, place))
    assert steady.poll() is None, "a writer failed though nobody killed it"
    for process in (steady, *others):
        assert process.poll() is None
        kill(process)
    write(place, "last")
    assert place.read_text() == "last"
    assert hidden(tmp_path) == []


@pytest.fixture
def draft_of_a_killed_writer(start: Start, tmp_path: Path) -> Iterator[Path]:
    kill(start(WAIT, tmp_path / "model"))
    (draft,) = hidden(tmp_path)
    yield draft


def test_drafts_of_other_machines_and_other_files_are_left_alone(
    draft_of_a_killed_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    users_own = [tmp_path / ".model.cache", tmp_path / ".model.00000000-mine", tmp_path / ".model.txt"]
    for folder in users_own[:2]:
        folder.mkdir()
        (folder / "lock").touch()
    users_own[2].touch()
    write(tmp_path / "other", "next")
    assert draft_of_a_killed_writer.exists()
    monkeypatch.setattr(files, "_MACHINE", "0badcafe")
    write(tmp_path / "model", "next")
    assert draft_of_a_killed_writer.exists()
    monkeypatch.undo()
    write(tmp_path / "model", "next")
    assert sorted(hidden(tmp_path)) == sorted(users_own)


def refuse(error: OSError) -> Callable[..., None]:
    def call(*_: object) -> None:
        raise error

    return call


def test_without_locks_everything_is_written_and_nothing_removed(
    draft_of_a_killed_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "model"
    with monkeypatch.context() as patch:
        patch.setattr(
            "adapter_compiler.saving.primitives.files.fcntl.flock", refuse(OSError(errno.ENOLCK, "No locks available"))
        )
        with written_beside(place) as draft:
            draft.write_text("without a lock")
            patch.undo()  # locks are there again, for another process
            write(place, "with a lock")
            assert draft.exists()
            assert not draft_of_a_killed_writer.exists()
    assert place.read_text() == "without a lock"
    assert hidden(tmp_path) == []


def test_a_draft_that_cannot_be_removed_is_named_and_stops_no_write(
    draft_of_a_killed_writer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("adapter_compiler.saving.primitives.files.shutil.rmtree", lambda *_, **__: None)
    with caplog.at_level(logging.WARNING), written_beside(tmp_path / "model") as draft:
        draft.write_text("next")
        monkeypatch.undo()
    assert (tmp_path / "model").read_text() == "next"
    assert caplog.messages[0].startswith(f"{draft_of_a_killed_writer} was left by a process that was killed")


def test_a_folder_that_cannot_be_listed_stops_no_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def list_others(folder: Path) -> list[str]:
        if folder == tmp_path:
            raise PermissionError(errno.EACCES, "Permission denied")
        return listdir(folder)

    listdir = os.listdir
    with monkeypatch.context() as patch:
        patch.setattr("adapter_compiler.saving.primitives.files.os.listdir", list_others)
        write(tmp_path / "model", "next")
    assert os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "n" * 246])
def test_the_longest_names_can_be_written(name: str, start: Start, tmp_path: Path) -> None:
    write(tmp_path / name, "old")
    kill(start(WAIT.replace("slow", "half"), tmp_path / name[:-5]))
    write(tmp_path / name, "new")
    write(tmp_path / name[:-5], "new")
    assert {path.name for path in tmp_path.iterdir()} == {name, name[:-5]}


def test_a_draft_that_is_removed_before_it_is_locked_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Path] = []

    def open_late(draft: Path) -> int:
        if not taken:
            taken.append(draft)
            files._remove_if_abandoned(draft, with_old=True)
        return open_lock(draft)

    open_lock = files._open_lock
    monkeypatch.setattr(files, "_open_lock", lambda draft: open_late(draft) if draft not in taken else open_lock(draft))
    write(tmp_path / "model", "new")
    assert len(taken) == 1
    assert not taken[0].exists()
    assert (tmp_path / "model").read_text() == "new"
