"""Work that takes long says what it does: by log messages, by a bar in a terminal, or not at all."""

from __future__ import annotations

import io
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.config import progress as room
from adapter_compiler.saving.folding.fold_files import fold_files

LOGGER = "adapter_compiler.config.progress"


@pytest.fixture(autouse=True)
def auto() -> Iterator[None]:
    before = ac.set_progress("auto")
    yield
    ac.set_progress(before)


class AtOnce:
    """A timer that does not wait."""

    def __init__(self, seconds: float, function: Callable[[], None]) -> None:
        assert seconds == 2
        self.start = function

    def cancel(self) -> None:
        """Too late."""


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """Everything is told at once, by log messages."""
    ac.set_progress("logging")
    monkeypatch.setattr(room, "Timer", AtOnce)
    monkeypatch.setattr(room, "BETWEEN", 0.0)
    caplog.set_level(logging.INFO, LOGGER)
    return caplog


def own_messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == LOGGER]


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu())
        return out


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch).square().mean()
    return out


def test_compile_starts_export_and_fold_say_what_they_do(quick: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    x = torch.randn(3, 6)
    adapted = ac.compile_with_adapters(Small().eval(), (x,), config=ac.AdapterConfig(rank=2))
    messages = own_messages(quick)
    assert "compile Small: plan adapters" in messages
    assert "compile Small: start second.weight (1 of 2)" in messages
    assert messages[-1].startswith("compile Small: done after ")
    for method in ("eva", "gradient_svd", "lora_ga"):
        quick.clear()
        ac.initialize_adapters(adapted, method, [x, x, x], loss)
        # One weight at a time, so that gradients take a pass over the batches for each of the two.
        total = 3 if method == "eva" else 6
        assert f"start by {method}: run batches ({total - 1} of {total})" in own_messages(quick)
    quick.clear()
    ac.export_onnx(adapted, tmp_path / "model.onnx", (x,))
    messages = own_messages(quick)
    assert any(message.startswith("export model.onnx: write by ") for message in messages)
    assert "export model.onnx: verify on batch 4" in messages
    # Folding is a part of it, and is not announced by itself.
    assert {message.split(":")[0] for message in messages} == {"export model.onnx"}


def test_folding_counts_weights(quick: pytest.LogCaptureFixture) -> None:
    adapted = ac.compile_with_adapters(Small(), (torch.randn(3, 6),), config=ac.AdapterConfig(rank=2))
    quick.clear()
    adapted.fold()
    assert own_messages(quick)[1:3] == ["fold: first.weight (0 of 2)", "fold: second.weight (1 of 2)"]


def test_folding_files_is_told_and_a_callback_takes_its_place(quick: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = Small()
    adapted = ac.compile_with_adapters(model, (torch.randn(3, 6),), config=ac.AdapterConfig(rank=2))
    adapted.save(tmp_path / "adapters")
    base = tmp_path / "base.safetensors"
    save_file(model.state_dict(), base)
    seen: list[tuple[str, int, int]] = []
    quick.clear()
    fold_files(base, tmp_path / "adapters", tmp_path / "a.safetensors", progress=lambda *told: seen.append(told))
    assert [(done, total) for _, done, total in seen] == [(1, 2), (2, 2)]
    assert own_messages(quick) == []


def test_what_is_quick_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    ac.set_progress("logging")
    caplog.set_level(logging.INFO, LOGGER)
    ac.compile_with_adapters(nn.Linear(4, 4)).fold()
    assert own_messages(caplog) == []


def test_off_is_off_and_a_wrong_mode_is_named(quick: pytest.LogCaptureFixture) -> None:
    assert ac.set_progress("off") == "logging"
    ac.compile_with_adapters(Small(), (torch.randn(3, 6),))
    assert own_messages(quick) == []
    with pytest.raises(ac.AdapterCompilerError, match=r"set_progress\('loud'\): expected one of 'auto', 'logging'"):
        ac.set_progress("loud")
    assert ac.set_progress("auto") == "off"


def test_a_failure_is_told_and_the_next_work_begins_anew(quick: pytest.LogCaptureFixture) -> None:
    def fail(name: str) -> None:
        with room.progress(name):
            room.tell("item", 1, 2)
            raise ValueError(name)

    for name in ("one", "two"):
        with pytest.raises(ValueError, match=name):
            fail(name)
    messages = own_messages(quick)
    assert [message.split(" after")[0] for message in messages if "failed" in message] == ["one: failed", "two: failed"]
    assert "two: item (1 of 2)" in messages


def test_work_inside_other_work_speaks_through_it(quick: pytest.LogCaptureFixture) -> None:
    with room.progress("outer"):
        with room.progress("inner"):
            room.tell("item")
        room.tell("after")
        with room.silence():
            room.tell("hidden")
            with room.progress("hidden"):
                room.tell("hidden")
    messages = own_messages(quick)
    assert messages[0] == "outer: has begun"
    assert messages[1:3] == ["outer: inner: item", "outer: after"]
    assert not any("hidden" in message for message in messages)


def test_messages_are_not_many(quick: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "BETWEEN", 60.0)
    with room.progress("work"):
        for i in range(100):
            room.tell("item", i, 100)
    assert [message.split(" after")[0] for message in own_messages(quick)] == ["work: has begun", "work: done"]


PROGRAM = """
import sys, time
from adapter_compiler.config import progress as room
room.DELAY = 0.0
with room.progress("fold"):
    room.tell("blocks.3.up[/red]", 4, 24)
    time.sleep(0.6)
print("end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_terminal_gets_a_bar(is_terminal: bool) -> None:
    import pty

    leader, follower = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    target = follower if is_terminal else subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, stderr=target, env=environment
    ) as process:
        os.close(follower)
        shown = read_all(leader) if is_terminal else (process.stderr or io.BytesIO()).read().decode()
        assert process.stdout is not None
        assert process.stdout.read() == b"end\n"
    os.close(leader)
    assert process.returncode == 0
    if is_terminal:
        assert "fold" in shown and "4/24" in shown and "blocks.3.up[/red]" in shown
    else:
        assert shown == ""


def read_all(leader: int) -> str:
    """What a program writes to its terminal, until it has ended."""
    parts: list[bytes] = []
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:  # how Linux tells that the other side is closed
            part = b""
        if not part:
            return b"".join(parts).decode()
        parts.append(part)
