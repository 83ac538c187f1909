"""The command line: help, options that cannot work, and errors as one line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from adapter_compiler.cli.demo import run
from adapter_compiler.cli.main import app
from adapter_compiler.errors import AdapterCompilerError

WIDE = {"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}


def invoke(*arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    answer = CliRunner().invoke(app, list(arguments), env=WIDE)
    return answer.exit_code, answer.stdout, answer.stderr


@pytest.mark.parametrize("command", [(), ("demo",)], ids=["adapter-compiler", "demo"])
def test_help_has_an_example(command: tuple[str, ...]) -> None:
    code, out, _ = invoke(*command, "--help")
    assert code == 0
    assert "Example: adapter-compiler demo --out results" in out


def test_every_option_of_the_demo_has_help() -> None:
    _, out, _ = invoke("demo", "--help")
    for option in ("--out", "--seed", "--steps", "--pretraining-steps", "--target-rank"):
        line = next(line for line in out.splitlines() if f" {option} " in line and "Example" not in line)
        assert line.rstrip("│ ").endswith((".", "]")), line


def test_without_command_the_help_is_shown() -> None:
    code, out, err = invoke()
    assert code == 2
    assert "demo" in out + err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("demo", "--steps", "3"), "Invalid value for '--steps': "),
        (("demo", "--steps", "many"), "Invalid value for '--steps': "),
        (("demo", "--seed", "-1"), "Invalid value for '--seed': "),
        (("demo", "--target-rank", "99"), "Invalid value for '--target-rank': "),
        (("demo", "--nonsense"), "--nonsense"),
        (("nonsense",), "No such command 'nonsense'."),
    ],
    ids=["few steps", "no number", "seed", "rank", "option", "command"],
)
def test_a_wrong_command_line_is_exit_code_2(arguments: tuple[str, ...], message: str) -> None:
    code, _, err = invoke(*arguments)
    assert code == 2
    assert message in err


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code, out, err = invoke("demo", "--out", str(tmp_path / "file" / "folder"))
    assert (code, out) == (1, "")
    assert err.startswith("error: out='")
    assert "cannot be created (Not a directory), expected a folder for model.onnx" in err
    assert err.count("\n") == 1


def test_missing_scikit_learn_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    code, _, err = invoke("demo", "--out", str(tmp_path))
    assert code == 1
    assert err.startswith("error: the demo reads its images from scikit-learn")
    assert err.endswith("install it with: pip install 'adapter-compiler[demo]'\n")
    assert err.count("\n") == 1


def test_an_error_of_many_lines_becomes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AdapterCompilerError("site [red]a[/red]:\n    no rank\n")

    monkeypatch.setattr(run, "run_demo", fail)
    assert invoke("demo") == (1, "", "error: site [red]a[/red]: no rank\n")


def test_an_unexpected_error_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(run, "run_demo", fail)
    assert isinstance(CliRunner().invoke(app, ["demo"]).exception, ZeroDivisionError)
