"""``adapter-compiler tune``: the smallest adapter of a task in a file, on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import adapter_compiler as ac
from adapter_compiler.cli.main import app

#: A layer whose target differs by rank 2; the wide adapter has rank 4.
TASK = """
import torch
from torch import nn
import adapter_compiler as ac

def make():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(10, 8, bias=False)).double()
    x = torch.randn(100, 10, dtype=torch.float64)
    U, V = (torch.linalg.qr(torch.randn(n, 2, dtype=torch.float64))[0] for n in (8, 10))
    return model, x, x @ (model[0].weight.detach() + U @ V.T).T

def task():
    model, x, y = make()

    def build():
        return ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=4))

    def train(adapted, share):
        optimizer = adapted.make_optimizer(lr=0.03)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=round(80 * share))
        for _ in range(round(80 * share)):
            (adapted(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    @torch.no_grad()
    def evaluate(adapted):
        return 1 - (adapted(x) - y).square().mean(1) / y.square().mean()

    return build, train, evaluate

def two():
    return None, None
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "tune_task.py"
    path.write_text(TASK)
    return path


def invoke(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(app, ["tune", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result.output


def test_the_right_size_is_found_and_written(file: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["tune", f"{file}:task", "--share", "0.99", "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["ranks"] == {"0.weight": 2}
    assert found["recommended"]["triplets"] == 2
    assert found["recommended"]["error"] > 0
    assert [point["triplets"] for point in found["points"]] == [1, 2, 4]
    assert len(found["spectrum"]["0.weight"]) == 4
    scope: dict[str, Any] = {}
    exec(TASK, scope)
    model, x, y = scope["make"]()
    loaded = ac.load(model, tmp_path / "out")
    score = float(1 - (loaded(x) - y).square().mean().detach() / y.square().mean())
    assert score == pytest.approx(found["recommended"]["score"], abs=1e-9)
    assert score > found["target"] > torch.finfo(torch.float32).eps


def test_the_table_marks_the_recommended_size(file: Path) -> None:
    lines = invoke(f"{file}:task", "--metric", "0.9", "--refinements", "0").splitlines()
    marked = [line for line in lines if "recommended" in line]
    assert len(marked) == 1
    assert "±" in marked[0]
    assert "enough 0.9; 1 run(s)" in lines[-1]


def test_errors_are_one_line(file: Path) -> None:
    expected = "returned a tuple; expected a function without arguments that returns (build, train, evaluate)"
    assert expected in invoke(f"{file}:two", code=1)
    assert "expected one of them" in invoke(f"{file}:task", "--share", "0.5", "--metric", "0.5", code=1)
