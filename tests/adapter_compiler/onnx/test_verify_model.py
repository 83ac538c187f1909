"""A file is compared with the model it should be, long after its export."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, ExportError, VerificationError
from adapter_compiler.onnx import verify_onnx


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mix, self.head = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        hidden = self.mix(self.embed(ids)).tanh() * mask.unsqueeze(-1)
        return {"hidden": hidden, "logits": self.head(hidden.sum(1))}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return Pair().eval()


EXAMPLE = (torch.arange(15).reshape(3, 5) % 9, torch.ones(3, 5))


def adapt(model: nn.Module) -> ac.AdaptedModel:
    adapted = ac.compile_with_adapters(model, EXAMPLE, config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.4)
    return adapted


def test_all_open_dimensions_are_varied(model: nn.Module, tmp_path: Path) -> None:
    report = ac.export_onnx(model, tmp_path / "model.onnx", EXAMPLE)
    before = (tmp_path / "model.onnx").read_bytes()
    checked = verify_onnx(report.path, model, EXAMPLE)
    assert tuple(dict.fromkeys(error.case for error in checked.errors)) == report.cases
    assert {error.output for error in checked.errors} == {"hidden", "logits"}
    assert checked.not_verified == ()
    assert (tmp_path / "model.onnx").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "model.onnx"]


def test_a_file_with_runtime_adapters_is_verified_without_and_with_them(model: nn.Module, tmp_path: Path) -> None:
    adapted = adapt(model)
    ac.export_onnx(adapted, tmp_path / "model.onnx", EXAMPLE, adapters="runtime")
    cases = {error.case for error in verify_onnx(tmp_path / "model.onnx", adapted, EXAMPLE).errors}
    assert {"example", "example, adapter active"} <= cases
    assert "example" in {error.case for error in verify_onnx(tmp_path / "model.onnx", model, EXAMPLE).errors}


def test_the_first_node_that_differs_is_named(model: nn.Module, tmp_path: Path) -> None:
    ac.export_onnx(model, tmp_path / "model.onnx", EXAMPLE)
    with torch.no_grad():
        model.get_parameter("mix.weight")[3, 3] += 1
    with pytest.raises(VerificationError, match=r"output hidden on example: .*first node that differs .*\(\w+, mix\)"):
        verify_onnx(tmp_path / "model.onnx", model, EXAMPLE)


def test_a_file_of_another_exporter_is_compared_by_its_names(model: nn.Module, tmp_path: Path) -> None:
    ac.export_onnx(model, tmp_path / "model.onnx", EXAMPLE)
    stored = onnx.load(tmp_path / "model.onnx")
    del stored.metadata_props[:]
    onnx.save(stored, tmp_path / "plain.onnx")
    assert verify_onnx(tmp_path / "plain.onnx", model, EXAMPLE).errors
    stored.graph.output[0].name = "renamed"
    for node in stored.graph.node:
        node.output[:] = ["renamed" if name == "hidden" else name for name in node.output]
        node.input[:] = ["renamed" if name == "hidden" else name for name in node.input]
    onnx.save(stored, tmp_path / "plain.onnx")
    with pytest.raises(ConfigError, match="has no output hidden, which the model returns; it has renamed, logits"):
        verify_onnx(tmp_path / "plain.onnx", model, EXAMPLE)


def test_the_wrong_call_is_refused(model: nn.Module, tmp_path: Path) -> None:
    ac.export_onnx(model, tmp_path / "model.onnx", EXAMPLE)
    with pytest.raises(ConfigError, match="has an input ids, the model's call gives x"):
        verify_onnx(tmp_path / "model.onnx", Named(), (torch.ones(2, 2),))
    (tmp_path / "cut.onnx").write_bytes((tmp_path / "model.onnx").read_bytes()[:-9])
    with pytest.raises(ExportError, match=r"onnx.checker refuses cut.onnx"):
        verify_onnx(tmp_path / "cut.onnx", model, EXAMPLE)


class Named(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1
