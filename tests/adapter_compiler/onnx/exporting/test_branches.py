"""Models that branch and loop on values by torch.cond and torch.while_loop, and calls with dataclasses."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac

pytestmark = pytest.mark.filterwarnings("ignore")


class Choice(nn.Module):
    def __init__(self, threshold: float = 0.0) -> None:
        super().__init__()
        self.warm, self.cold, self.threshold = nn.Linear(4, 4), nn.Linear(4, 4), threshold

    def forward(self, x: Tensor) -> Any:
        return torch.cond(x.sum() > self.threshold, lambda x: self.warm(x), lambda x: self.cold(x).relu(), (x,))


class Repeat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Any:
        start = (torch.zeros((), dtype=torch.long), x)
        return torch.while_loop(
            lambda i, y: (i < 5) & (y.abs().max() < 3), lambda i, y: (i + 1, self.layer(y) * 1.5), start
        )[1]


def read_operators(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def adapt(model: nn.Module, *sites: str) -> Any:
    adapted = ac.compile_with_adapters(model, (torch.randn(3, 4),), config=ac.AdapterConfig(rank=2, sites=sites))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    return adapted


@pytest.mark.parametrize(("operator", "sites"), [("If", ("warm.weight", "cold.weight")), ("Loop", ("layer.weight",))])
def test_branches_and_loops_of_torch_are_exported_with_their_adapters(
    operator: str, sites: tuple[str, ...], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    adapted = adapt((Choice() if operator == "If" else Repeat()).eval(), *sites)
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (torch.randn(3, 4),), adapters="runtime")
    assert operator in read_operators(tmp_path / "model.onnx")
    assert {"values times -1", "random values 8", "example, random adapters"} <= set(report.cases)
    assert not report.untaken
    session, merged = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")), adapted.copy_base().eval()
    for x in (torch.full((2, 4), 0.5), torch.full((2, 4), -0.5), torch.randn(5, 4) * 4):
        found = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
        torch.testing.assert_close(found, merged(x).detach(), rtol=1e-4, atol=1e-5)


def test_a_branch_that_no_input_takes_is_in_the_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    report = ac.export_onnx(Choice(1e6).eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert len(report.untaken) == 1 and report.untaken[0].endswith("where its condition is true")
    assert "no input takes it" in " ".join(str(report).split())


@dataclasses.dataclass
class Batch:
    x: Tensor
    scale: float = 2.0


class TakesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, batch: Batch) -> Tensor:
        return self.layer(batch.x) * batch.scale  # type: ignore[no-any-return]


def test_a_dataclass_of_ones_own_is_an_input(tmp_path: Path) -> None:
    torch.manual_seed(0)
    example = Batch(torch.randn(3, 4))
    adapted = ac.compile_with_adapters(TakesBatch().eval(), (example,), config=ac.AdapterConfig(rank=2))
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (example,))
    assert report.inputs == ("batch.x",) and report.dynamic_axes == {"batch.x": (0,)}
    session, x = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")), torch.randn(7, 4)
    found = torch.from_numpy(session.run(None, {"batch.x": x.numpy()})[0])
    torch.testing.assert_close(found, adapted(Batch(x)).detach(), rtol=1e-4, atol=1e-5)
