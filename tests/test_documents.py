"""What README and docs say is true: their commands exist, their code runs, their links lead somewhere."""

from __future__ import annotations

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
from tests.documents import ROOT, find_links, read_blocks, read_python

DOCUMENTS = ["README.md", "CONTRIBUTING.md", *(str(f.relative_to(ROOT)) for f in sorted(ROOT.glob("docs/*.md")))]


class Result(NamedTuple):
    loss: Tensor
    logits: Tensor


class Classifier(nn.Module):
    """What the README calls ``model``: it takes keywords and returns an object with a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 16)

    def forward(self, x: Tensor, labels: Tensor) -> Result:
        logits = self.down(torch.tanh(self.up(x)))
        return Result(F.cross_entropy(logits, labels), logits)


def make_batch() -> dict[str, Tensor]:
    return {"x": torch.randn(8, 16), "labels": torch.randint(16, (8,))}


def test_the_first_two_blocks_of_the_readme_are_the_two_commands() -> None:
    blocks = read_blocks("README.md")
    assert [block.text for block in blocks[:2]] == ["./run demo\n", "./run tests\n"]
    usage = subprocess.run(["sh", str(ROOT / "run"), "help"], check=True, capture_output=True, text=True).stdout
    for command in ("demo", "tests"):
        assert re.search(rf"^  {command} ", usage, flags=re.MULTILINE)


def test_the_code_of_the_readme_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = Classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scope: dict[str, Any] = {"model": model, "batch": make_batch(), "loader": [make_batch() for _ in range(40)]}
    exec(compile(read_python("README.md"), "README.md", "exec"), scope)

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
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_the_code_about_choosing_sites_runs() -> None:
    scope: dict[str, Any] = {"__name__": "choosing_sites"}
    exec(compile(read_python("docs/choosing_sites.md"), "docs/choosing_sites.md", "exec", dont_inherit=True), scope)
    assert scope["text"].startswith("{")


@pytest.mark.slow
def test_the_code_and_the_commands_about_deploying_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = read_blocks("docs/deploying.md")
    (tmp_path / "my_model.py").write_text(blocks[0].text, encoding="utf-8")
    scope: dict[str, Any] = {"__name__": "deploying"}
    exec(compile(read_python("docs/deploying.md"), "docs/deploying.md", "exec", dont_inherit=True), scope)
    fields = re.findall(r"^\| `(.*)` \|", (ROOT / "docs/deploying.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert all(hasattr(scope["report"], name) for names in fields for name in names.split("`, `"))
    (commands,) = (block.text.splitlines() for block in blocks if block.language == "sh")
    for command in commands:
        program, *arguments = shlex.split(command)
        assert program == "adapter-compiler"
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, (command, result.output)


def test_the_readme_lists_every_public_name() -> None:
    rows = re.findall(r"^\| `(\w+)", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(rows) == sorted(ac.__all__)


def test_the_example_pass_works_and_its_own_tests_pass() -> None:
    scope: dict[str, Any] = {"__name__": "writing_passes"}
    exec(compile(read_python("docs/writing_passes.md"), "docs/writing_passes.md", "exec", dont_inherit=True), scope)
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

    scope: dict[str, Any] = {"__name__": "writing_passes"}
    exec(compile(read_python("docs/writing_passes.md"), "docs/writing_passes.md", "exec", dont_inherit=True), scope)
    model, x = Region().train(), torch.randn(3, 4)
    graph_module = scope["capture"](model)
    assert len(list(scope["find_idle_dropouts"](graph_module))) == 2
    assert scope["RemoveIdleDropoutPass"]()(graph_module).modified
    torch.manual_seed(0)
    expected = model(x)
    torch.manual_seed(0)
    assert torch.equal(graph_module(x)[0], expected)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_files(document: str) -> None:
    for link in find_links(document):
        assert ((ROOT / document).parent / link).exists(), f"{document} links to {link}, which does not exist"


def test_the_readme_shows_its_pictures() -> None:
    pictures = [link for link in find_links("README.md") if link.endswith((".svg", ".png"))]
    assert pictures == ["docs/pipeline.svg", "docs/demo_report.png"]
    assert xml.etree.ElementTree.parse(ROOT / pictures[0]).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    assert (ROOT / pictures[1]).stat().st_size < 150_000
