"""What README and docs say is true: their commands exist, their code runs, their links lead somewhere."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import xml.etree.ElementTree
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app
from tests.documents import ROOT, find_documents, find_links, read_blocks, read_python, read_text

#: Guides whose code is one program, and whether it takes more than a few seconds.
GUIDES = {
    "getting_started": True,
    "choosing_sites": False,
    "training": True,
    "saving": False,
    "several_adapters": False,
    "quantizing": True,
}


class Result(NamedTuple):
    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    """What the README calls ``model``: it takes keywords and returns an object with a loss where it gets labels."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Result:
        logits = self.down(torch.tanh(self.up(x)))
        return Result(None if labels is None else F.cross_entropy(logits, labels), logits)


def make_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 16), "labels": torch.randint(16, (8,))}


def run_python(document: str, **names: Any) -> dict[str, Any]:
    """Run the python blocks of a document as one program; returns the names that it leaves."""
    scope: dict[str, Any] = {"__name__": Path(document).stem, **names}
    exec(compile(read_python(document), document, "exec", dont_inherit=True), scope)
    return scope


def test_the_first_two_blocks_of_the_readme_are_the_two_commands() -> None:
    blocks = read_blocks("README.md")
    assert [block.text for block in blocks[:2]] == ["./run demo\n", "./run tests\n"]
    usage = subprocess.run(["sh", str(ROOT / "run"), "help"], check=True, capture_output=True, text=True).stdout
    for command in ("demo", "tests"):
        assert re.search(rf"^  {command} ", usage, flags=re.MULTILINE)


def test_the_first_example_of_the_readme_runs_as_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    example = next(block.text for block in read_blocks("README.md") if block.language == "python")
    assert len([line for line in example.splitlines() if line]) == 11
    scope: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "README.md", "exec", dont_inherit=True), scope)
    ranks, _, error = printed.getvalue().rpartition(" ")
    assert ranks == str(scope["budget"].ranks())
    assert sum(scope["budget"].ranks().values()) == 2 * 4
    assert 0 <= float(error) < 1e-5
    assert (tmp_path / "model.onnx").is_file()


def test_the_code_of_the_readme_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scope: dict[str, Any] = {"model": model, "batch": make_batch(), "loader": [make_batch() for _ in range(40)]}
    (code,) = (block.text for block in read_blocks("README.md") if "example_kwargs=batch" in block.text)
    exec(compile(code, "README.md", "exec", dont_inherit=True), scope)

    adapted, merged, report = scope["adapted"], scope["merged"], scope["report"]
    assert [len(lam) for name, lam in adapted.adapters.named_parameters() if name.endswith("lam")] == [12, 12]
    assert scope["budget"].live_triplets == 2 * 8
    assert type(merged) is Classifier
    assert list(merged.state_dict()) == list(before)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert not torch.equal(merged.up.weight, model.up.weight)
    torch.testing.assert_close(merged.eval()(**scope["batch"]), adapted.eval()(**scope["batch"]))
    assert (tmp_path / "model.onnx").is_file()
    assert 0 <= report.max_abs_error < 1e-4
    assert report.inputs == ("x",) and report.outputs == ("logits",), "labels have no place in the file"
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "guide", [pytest.param(name, marks=[pytest.mark.slow] * is_slow) for name, is_slow in GUIDES.items()]
)
def test_the_code_of_a_guide_runs(guide: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scope = run_python(f"docs/guides/{guide}.md")
    if guide == "choosing_sites":
        assert scope["text"].startswith("{")


def test_every_guide_with_code_is_run() -> None:
    with_code = {Path(d).stem for d in find_documents() if d.startswith("docs/guides/") and read_python(d)}
    assert with_code - {"examples"} == GUIDES.keys() | {"deploying", "writing_passes"}


@pytest.mark.slow
def test_the_code_and_the_commands_about_deploying_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = read_blocks("docs/guides/deploying.md")
    (tmp_path / "my_model.py").write_text(blocks[0].text, encoding="utf-8")
    scope = run_python("docs/guides/deploying.md")
    fields = re.findall(r"^\| `(.*)` \|", read_text("docs/guides/deploying.md"), flags=re.MULTILINE)
    assert all(hasattr(scope["report"], name) for names in fields for name in names.split("`, `"))
    (commands,) = (block.text.splitlines() for block in blocks if block.language == "sh")
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "adapter-compiler"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output)


def test_the_readme_lists_every_public_name() -> None:
    rows = re.findall(r"^\| `(\w+)", read_text("README.md"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(ac.__all__)


def test_the_example_pass_works_and_its_own_tests_pass() -> None:
    scope = run_python("docs/guides/writing_passes.md")
    tests = [value for name, value in scope.items() if name.startswith("test_")]
    assert len(tests) == 2
    for test in tests:
        test()


def test_the_example_pass_keeps_its_contract_in_regions_and_in_training() -> None:
    class Region(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                y = F.dropout(torch.tanh(x), 0.5, training=False)
            return y + F.dropout(x, 0.0, training=True) + F.dropout(x, 0.5, training=self.training)

    scope = run_python("docs/guides/writing_passes.md")
    model, x = Region().train(), torch.randn(3, 4)
    graph_module = scope["capture"](model)
    assert len(list(scope["find_idle_dropouts"](graph_module))) == 2
    assert scope["RemoveIdleDropoutPass"]()(graph_module).modified
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(graph_module(x)[0], expected)


@pytest.mark.parametrize("document", find_documents())
def test_links_lead_to_files(document: str) -> None:
    for link in find_links(document):
        assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}, which does not exist"


def test_the_readme_shows_its_pictures() -> None:
    pictures = [link for link in find_links("README.md") if link.endswith((".svg", ".png"))]
    names = ("pipeline.svg", "demo_report.png", "run_report.png")
    assert pictures == [f"docs/images/{name}" for name in names]
    assert xml.etree.ElementTree.parse(ROOT / pictures[0]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert all((ROOT / picture).stat().st_size < 150_000 for picture in pictures[1:])
