"""Full disks, folders without permission, killed processes: clear errors, no partial file, the old one intact.

Every way of writing runs in a process of its own: a limit on file sizes stands for a full disk, so that it is met
inside whichever library does the writing, and SIGKILL comes at the moment when a draft takes its place.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from adapter_compiler.saving.primitives.files import written_beside

SETUP = """
import os, resource, signal, sys
from pathlib import Path
import torch
from torch import nn
from safetensors.torch import save_file
import adapter_compiler as ac
from adapter_compiler.saving.exchange.convert import convert_adapters
from adapter_compiler.saving.folding.fold_files import fold_files
from adapter_compiler.onnx.quantize import quantize_onnx

folder = Path(sys.argv[1])
torch.manual_seed(0)
model, x = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).eval(), torch.randn(5, 64)
adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=16))
with torch.no_grad():
    for parameter in adapted.adapters.parameters():
        parameter.normal_(0, 0.3)
save_file(dict(model.state_dict()), folder / "base.safetensors")
adapted.save(folder / "adapters")
ac.export_onnx(model, folder / "base.onnx", (x,))
new = folder / "new"
writers = {
    "export": lambda: ac.export_onnx(adapted, new / "model.onnx", (x,)),
    "save": lambda: adapted.save(new),
    "onnx_adapter": lambda: ac.save_onnx_adapter(adapted, new / "a.onnx_adapter"),
    "fold": lambda: fold_files(folder / "base.safetensors", folder / "adapters", new / "out.safetensors"),
    "fold onnx": lambda: fold_files(folder / "base.onnx", folder / "adapters", new / "out.onnx"),
    "convert": lambda: convert_adapters(folder / "adapters", new, to="peft-lora"),
    "int8": lambda: quantize_onnx(folder / "base.onnx", new / "int8.onnx"),
}
"""

FILL = """
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
for name, write in writers.items():
    try:
        write()
    except Exception as error:
        print(name, type(error).__name__, " ".join(str(error).split()), sep="|")
    print("left", name, *new.rglob("*"), sep="|")
"""

KILL = """
new.mkdir()
for name in ("model.onnx", "adapters.safetensors", "a.onnx_adapter", "out.safetensors"):
    (new / name).write_text("old")
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
os.replace = die
writers[sys.argv[2]]()
"""


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", SETUP + code, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="file sizes cannot be limited")
def test_a_full_disk_leaves_nothing_and_says_what_to_do(tmp_path: Path) -> None:
    done = run(FILL, tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    left = [line for line in lines if line.startswith("left|")]
    assert [line.count("|") for line in left] == [1] * 7, left
    errors = {line.split("|")[0]: line for line in lines if not line.startswith("left|")}
    assert errors.keys() == {"export", "int8", "save", "onnx_adapter", "fold", "fold onnx", "convert"}
    pattern = r"OSError\|.*new/[\w.]+ cannot be written \(.*\), what was there before is as it was"
    for line in errors.values():
        assert re.search(pattern, line), line
        assert line.endswith("free some space or give another place")


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("export", "model.onnx"),
        ("save", "adapters.safetensors"),
        ("onnx_adapter", "a.onnx_adapter"),
        ("fold", "out.safetensors"),
    ],
)
def test_a_killed_process_leaves_the_old_files_and_a_draft_that_the_next_write_removes(
    name: str, file: str, tmp_path: Path
) -> None:
    done = run(KILL, tmp_path, name)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = list((tmp_path / "new").iterdir())
    visible = [path for path in left if not path.name.startswith(".")]
    assert len(visible) == 4
    assert len(left) == 5
    assert {path.read_text() for path in visible} == {"old"}
    with written_beside(tmp_path / "new" / file) as draft:
        draft.write_text("new")
    assert sorted((tmp_path / "new").iterdir()) == sorted(visible)
