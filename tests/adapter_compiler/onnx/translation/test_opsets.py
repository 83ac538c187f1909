"""The operator set is the caller's choice; what cannot be written is refused, and never replaced by another one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, ExportError


def build() -> nn.Module:
    """LayerNormalization exists since opset 17, Gelu since 20: older files need other nodes."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).eval()


@pytest.mark.parametrize(
    ("opset", "exporter", "operator"),
    [
        (11, "TorchScript", "ReduceMean"),
        (17, "torch.export", "LayerNormalization"),
        (18, "torch.export", "Erf"),
        (20, "torch.export", "Gelu"),
        (23, "torch.export", "Gelu"),
    ],
)
def test_the_file_has_the_opset_that_was_asked_for(opset: int, exporter: str, operator: str, tmp_path: Path) -> None:
    model, x = build(), torch.randn(3, 4)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,), opset=opset)
    stored = onnx.load(report.path)
    assert {entry.domain: entry.version for entry in stored.opset_import} == {"": opset}
    assert report.opset == opset
    assert report.strategy.startswith(exporter)
    assert operator in {node.op_type for node in stored.graph.node}
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    other = torch.randn(5, 4)
    found = torch.from_numpy(session.run(None, {"input": other.numpy()})[0])
    torch.testing.assert_close(found, model(other).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("opset", [3, 99, 0, -1, "18", True, 18.0])
def test_what_no_exporter_writes_is_refused_at_once(opset: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        ac.export_onnx(build(), tmp_path / "model.onnx", (torch.randn(3, 4),), opset=opset)
    message = str(caught.value)
    assert f"opset={opset!r}" in message
    assert "expected None or an integer from 7 to 25" in message
    assert "leave it out" in message
    assert list(tmp_path.iterdir()) == []


def test_another_opset_than_the_one_asked_for_is_no_success(tmp_path: Path) -> None:
    """Erf has no form in opset 7; torch's exporter would leave the file at 18."""
    with pytest.raises(ExportError, match=r"the exporter wrote opset 18, requested was 7: .*; ask for a newer one"):
        ac.export_onnx(build(), tmp_path / "model.onnx", (torch.randn(3, 4),), opset=7)
    assert list(tmp_path.iterdir()) == []
