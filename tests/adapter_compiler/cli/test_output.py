"""Standard output is the result alone, valid JSON with ``--json``; errors of the user's own code are one line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.common.output import command_output, dump_json
from adapter_compiler.cli.main import app

#: Prints in each way that a program can, and fails in several.
MODEL = """
import os
import sys
import torch
from torch import nn

print("noise on import")

class Loud(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 3)

    def forward(self, x):
        print("noise in forward")
        return self.inner(x)

def build():
    print("noise from Python")
    os.system("echo noise from a process")
    os.write(1, b"noise from a descriptor")
    return Loud().eval(), (torch.randn(2, 4),), {}

def untranslatable():
    class Net(nn.Module):
        def forward(self, x):
            return torch.special.bessel_j0(x)
    return Net().eval(), (torch.randn(2, 4),), {}

def raises():
    return {}["missing key"]

def raises_in_torch():
    return nn.Linear("a", 3)

def leaves():
    sys.exit("enough")

def adapts_nothing():
    import adapter_compiler as ac
    return ac.compile_with_adapters(nn.ReLU(), (torch.ones(2),)), (), {}
"""


def find_line(text: str) -> str:
    number = next(number for number, line in enumerate(MODEL.splitlines(), 1) if text in line)
    return f"line {number} of loud.py"


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "loud.py").write_text(MODEL)
    return str(tmp_path / "loud.py")


def invoke(*arguments: object, **environment: str) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"NO_COLOR": "1", **environment})


def run_process(*arguments: object) -> subprocess.CompletedProcess[str]:
    code = "from adapter_compiler.cli.main import app; app()"
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def test_a_process_writes_json_and_nothing_else(target: str, tmp_path: Path) -> None:
    done = run_process("export", f"{target}:build", "-o", tmp_path / "model.onnx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["max_abs_error"] < 1e-4
    for noise in ("on import", "in forward", "from Python", "from a process", "from a descriptor"):
        assert f"noise {noise}" in done.stderr


@pytest.mark.parametrize("as_json", [False, True])
def test_exporters_print_nothing(as_json: bool, target: str, tmp_path: Path) -> None:
    """The TorchScript exporter prints the graph that it fails on, past Python."""
    arguments = ("export", f"{target}:untranslatable", "-o", tmp_path / "model.onnx", *["--json"] * as_json)
    done = run_process(*arguments)
    assert done.returncode == 1
    assert "Torch IR graph" not in done.stdout + done.stderr
    if as_json:
        assert json.loads(done.stdout)["error"] == "ExportError"
    else:
        assert done.stdout == "noise on import\n"
        assert done.stderr.startswith("error: torch.onnx has no translation for this model")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            "raises",
            f"its code raises KeyError: 'missing key' ({find_line('missing key')}); expected a function",
        ),
        ("raises_in_torch", f"({find_line('nn.Linear(' + chr(34))})"),
        ("leaves", f"its code raises SystemExit: enough ({find_line('enough')})"),
        ("absent", "loud.py has no function absent; expected a function without arguments"),
        ("adapts_nothing", "ReLU has no weight to adapt"),
    ],
)
@pytest.mark.parametrize("command", ["export", "sites", "verify"])
def test_errors_of_the_users_code_are_one_line(command: str, function: str, message: str, target: str) -> None:
    named = f"{target}:{function}"
    arguments = {"export": (named, "-o", "x.onnx"), "sites": (named,), "verify": ("x.onnx", "--model", named)}[command]
    result = invoke(command, *arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    found = json.loads(invoke(command, *arguments, "--json").stdout)
    assert message in found["message"]
    assert found["error"] in ("ConfigError", "SiteError")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def build(:\n", "its code raises SyntaxError: invalid syntax (broken.py, line 1) (line 1 of broken.py)"),
        ("import numpyy\n", "its code raises ModuleNotFoundError: No module named 'numpyy' (line 1 of broken.py)"),
        ("x = 1 / 0\n", "its code raises ZeroDivisionError: division by zero (line 1 of broken.py)"),
    ],
)
def test_files_that_cannot_be_imported(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(text)
    assert message in invoke("sites", f"{tmp_path / 'broken.py'}:build").stderr


def test_modules_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = invoke("sites", "no_such_package.models:build")
    assert "module no_such_package.models cannot be imported: No module named 'no_such_package'" in result.stderr
    monkeypatch.chdir(tmp_path)
    (tmp_path / "imports_nothing.py").write_text("import no_such_package\n")
    result = invoke("sites", "imports_nothing:build")
    assert "its code raises ModuleNotFoundError: No module named 'no_such_package' (line 1 of" in result.stderr


def test_traceback_shows_where(target: str) -> None:
    result = invoke("sites", f"{target}:raises", "--traceback")
    assert result.exit_code == 1
    place = f'loud.py", {find_line("missing key").removesuffix(" of loud.py")}, in raises'
    assert place in result.stderr
    assert "ConfigError: " in result.stderr
    result = invoke("sites", f"{target}:raises", "--traceback", "--json")
    assert json.loads(result.stdout)["error"] == "ConfigError"
    assert place in result.stderr


def test_wrong_usage_is_json_as_well(target: str) -> None:
    result = invoke("export", f"{target}:build", "--json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["error"] == "MissingParameter"
    message = json.loads(invoke("sites", "a.py:b", "--rank", "many", "--json").stdout)["message"]
    assert message.startswith("Invalid value for '--rank'")
    assert invoke("sites", "--help", "--json").exit_code == 0


def test_errors_that_nobody_expected_are_json_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended, command_output(as_json=True):
        raise ZeroDivisionError("by zero")
    assert ended.value.exit_code == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"error": "ZeroDivisionError", "message": "by zero"}
    assert "Traceback" in err


def test_numbers_that_json_lacks_are_text() -> None:
    nan, inf = float("nan"), float("inf")
    data = {"a": [nan, (inf, -inf)], "b": {"c": 1.5}, "d": Path("e"), 3: torch.float32}
    found = json.loads(dump_json(data), parse_constant=pytest.fail)
    assert found == {"a": ["NaN", ["Infinity", "-Infinity"]], "b": {"c": 1.5}, "d": "e", "3": "torch.float32"}


def test_outputs_that_are_nan_are_valid_json(tmp_path: Path) -> None:
    (tmp_path / "nan.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self): super().__init__(); self.inner = nn.Linear(4, 3)\n"
        "    def forward(self, x, y): return self.inner(x).log(), y\n"
        "def build(): return Net().eval(), (torch.randn(2, 4), torch.full((2, 3), float('inf'))), {}\n"
    )
    result = invoke("export", f"{tmp_path / 'nan.py'}:build", "-o", tmp_path / "nan.onnx", "--json")
    assert "PyTorch gives inf or nan only" in json.loads(result.stdout, parse_constant=pytest.fail)["message"]


def test_names_in_brackets_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "[red]runs[/red]"
    adapted = ac.compile_with_adapters(nn.Linear(4, 3), (torch.ones(2, 4),), config=ac.AdapterConfig(rank=1))
    adapted.save(folder)
    assert "[red]runs[/red]" in invoke("adapters", "list", tmp_path, COLUMNS="200").stdout
    written = invoke("adapters", "convert", folder, "-o", tmp_path / "[b]", "--to", "peft-lora")
    assert written.stdout == f"wrote {tmp_path / '[b]'}\n"


def test_a_folder_without_adapters_says_so(tmp_path: Path) -> None:
    result = invoke("adapters", "list", tmp_path)
    assert (result.exit_code, result.stdout) == (0, f"no adapters in {tmp_path} or in a folder below it\n")
    assert json.loads(invoke("adapters", "list", tmp_path, "--json").stdout) == []
    result = invoke("adapters", "list", tmp_path / "none")
    assert (result.exit_code, result.stdout) == (1, "")


@pytest.mark.parametrize("command", ["export", "sites", "verify"])
def test_help_says_that_code_is_run(command: str) -> None:
    assert "The code is run: the module is imported, and the function is called" in " ".join(
        invoke(command, "--help", COLUMNS="300").stdout.split()
    )


DEEP = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.self_attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.up, self.down = nn.Linear(64, 256), nn.Linear(256, 64)

    def forward(self, x):
        x = x + self.self_attention(x, x, x)[0]
        return x + self.down(torch.relu(self.up(x)))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layers_of_the_encoder": nn.Sequential(*(Block() for _ in range(4)))})
        self.head = nn.Linear(64, 9)

    def forward(self, x):
        return self.head(self.encoder["layers_of_the_encoder"](x))

def build():
    return Model().eval(), (torch.randn(2, 5, 64),), {}
"""


def test_sites_are_readable_in_80_columns(tmp_path: Path) -> None:
    (tmp_path / "deep.py").write_text(DEEP)
    lines = [
        line.rstrip() for line in invoke("sites", f"{tmp_path / 'deep.py'}:build", COLUMNS="80").stdout.splitlines()
    ]
    assert max(map(len, lines)) <= 80
    shown = [line.split() for line in lines]
    assert "encoder.layers_of_the_encoder.0–3 (4 equal blocks)" in lines
    assert ["up", "feed_forward.up", "256×64", "12", "3,852"] in shown
    assert ["self_attention.in_proj_weight", "attention.qkv", "192×64", "12", "3,084"] in shown
    assert ["head", "head", "9×64", "9", "666"] in shown
    assert lines[0] == "17 adapted weights"
    assert "…" not in "".join(lines)


def test_standard_output_comes_back() -> None:
    """Also that of the process, which C prints to with a delay."""
    code = (
        "import ctypes, sys\n"
        "from adapter_compiler.cli.common.output import command_output\n"
        "libc = ctypes.CDLL(None)\n"
        "with command_output(as_json=True) as output:\n"
        "    libc.puts(b'from C')\n"
        "    print('from Python')\n"
        "    output.write({'a': 1})\n"
        "print('after', flush=True)\n"
        "libc.puts(b'after from C')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout.removesuffix("after\nafter from C\n")) == {"a": 1}
    assert sorted(done.stderr.splitlines()) == ["from C", "from Python"]
