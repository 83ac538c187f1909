"""Names up to the 255 bytes that file systems take work for every file, and leave nothing beside them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.onnx.quantize import quantize_onnx
from adapter_compiler.saving.folding.fold_files import fold_files


def make_name(length: int, suffix: str) -> str:
    """A name of this many bytes, with characters of two bytes."""
    rest = length - len(suffix.encode())
    return "é" * (rest // 2) + "e" * (rest % 2) + suffix


@pytest.mark.parametrize("length", [246, 251, 255])
def test_long_names(length: int, tmp_path: Path) -> None:
    suffixes = ("b.onnx", "p.onnx", "8.onnx", "f.onnx", ".onnx_adapter")
    base, plain, int8, folded, adapter = files = [tmp_path / make_name(length, suffix) for suffix in suffixes]
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(4, 6)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2))
    ac.export_onnx(adapted, base, (x,), adapters="runtime")
    ac.OnnxAdapters(base).load("a", ac.save_onnx_adapter(adapted, adapter))
    ac.export_onnx(model, plain, (x,))
    quantize_onnx(plain, int8)
    fold_files(base, adapted.save(tmp_path / make_name(length, "s")).parent, folded)
    assert sorted(file for file in tmp_path.iterdir() if file.is_file()) == sorted(files)
    assert len(list(tmp_path.iterdir())) == len(files) + 1
