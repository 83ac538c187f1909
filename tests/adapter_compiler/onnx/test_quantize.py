"""Int8 copies: what they cost is measured on random or on given inputs, and too much is refused with advice."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, VerificationError
from adapter_compiler.onnx.quantize import quantize_onnx


@pytest.fixture
def source(tmp_path: Path) -> Path:
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).eval()
    ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(5, 6),))
    return tmp_path / "model.onnx"


def test_the_loss_is_measured_on_random_values(source: Path, tmp_path: Path) -> None:
    report = quantize_onnx(source, tmp_path / "int8.onnx", draws=5)
    assert "MatMulInteger" in {node.op_type for node in onnx.load(report.path).graph.node}
    assert {error.case for error in report.errors} == {f"random values {i}" for i in range(1, 6)}
    assert 0 < report.median_rel_error <= report.max_rel_error < 0.1
    assert report.bytes_after == report.path.stat().st_size


def test_every_output_feature_has_a_scale_of_its_own(tmp_path: Path) -> None:
    """With one scale for all, small rows would be rounded to nothing."""
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(4, 6) * torch.tensor([[1.0], [1e-2], [1e-3], [1e-4]]))  # type: ignore[operator]
        model[0].bias.zero_()  # type: ignore[operator]
    ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(5, 6),))
    quantize_onnx(tmp_path / "model.onnx", tmp_path / "int8.onnx")
    tensors = onnx.load(tmp_path / "int8.onnx").graph.initializer
    assert [list(tensor.dims) for tensor in tensors if tensor.name.endswith("_scale")] == [[4]]


def test_a_file_with_inputs_for_adapters_is_refused(tmp_path: Path) -> None:
    model, x = nn.Sequential(nn.Linear(6, 16)).eval(), torch.randn(5, 6)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2))
    report = ac.export_onnx(adapted, tmp_path / "base.onnx", (x,), adapters="runtime")
    with pytest.raises(ConfigError, match=r"base.onnx has inputs for adapters \(0.weight.adapter_A\), expected a file"):
        quantize_onnx(report.path, tmp_path / "int8.onnx")
    assert not (tmp_path / "int8.onnx").exists()


def test_given_inputs_are_used_instead(source: Path, tmp_path: Path) -> None:
    name = onnx.load(source).graph.input[0].name
    examples: list[Mapping[str, Any]] = [{name: torch.randn(5, 6)}, {name: np.ones((5, 6), np.float32)}]
    report = quantize_onnx(source, tmp_path / "int8.onnx", examples=examples)
    assert [error.case for error in report.errors] == ["example 1", "example 2"]


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([{"nothing": torch.ones(5, 6)}], "example 1 lacks the input .*, expected those of model.onnx"),
        ([], "is empty, expected at least one input"),
    ],
)
def test_wrong_inputs_are_refused(
    examples: list[Mapping[str, Any]], message: str, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize_onnx(source, tmp_path / "int8.onnx", examples=examples)
    assert not (tmp_path / "int8.onnx").exists()


def test_too_large_a_loss_is_refused_with_advice(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VerificationError, match=r"in int8, output output differs on random values \d by \d\.\d%"
    ) as refused:
        quantize_onnx(source, tmp_path / "int8.onnx", largest_rel_error=1e-4)
    text = str(refused.value)
    assert "the median over random values in the example's ranges is" in text
    assert "no int8 file was written; compare on real inputs (quantize_onnx(..., examples=...))" in text
    name = onnx.load(source).graph.input[0].name
    with pytest.raises(VerificationError, match="no int8 file was written; raise largest_rel_error, or keep"):
        quantize_onnx(source, tmp_path / "x.onnx", examples=[{name: torch.ones(5, 6)}], largest_rel_error=1e-9)
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]
