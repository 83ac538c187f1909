"""Which way of exporting is taken, and what the report says about it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import adapter_compiler as ac
from adapter_compiler.errors import ExportError, VerificationError


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Packed(nn.Module):
    """torch.export refuses packed sequences; a trace gets through."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(4, 6, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
        y: Tensor = self.head(pad_packed_sequence(self.cell(packed)[0], batch_first=True, total_length=x.shape[1])[0])
        return y


def test_the_last_resort_is_a_verified_trace(tmp_path: Path) -> None:
    model, x, lengths = Packed().eval(), torch.randn(3, 5, 4), torch.tensor([5, 2, 4])
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x, lengths))
    assert report.strategy.startswith("TorchScript")
    assert [a.strategy.partition(",")[0] for a in report.attempts[:3]] == ["torch.export"] * 3
    assert all(attempt.reason for attempt in report.attempts[:-1])
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    other = torch.tensor([1, 5, 3])
    found = session.run(None, {"x": x.numpy(), "lengths": other.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x, other).detach(), rtol=1e-4, atol=1e-5)


class Guarded(nn.Module):
    """Its ``forward`` captures; what the hook does with the result does not."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, shift: Tensor) -> dict[str, Tensor | None]:
        hidden = self.up(x).tanh()
        y = self.down(hidden) + shift
        return {"y": y, "again": y, "nothing": None, "hidden": hidden}


def refuse_infinite(_: nn.Module, __: Any, result: dict[str, Tensor]) -> None:
    if not result["y"].isfinite().all():
        raise ValueError("infinite")


def double(_: nn.Module, __: Any, result: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": result["y"] * 2} if result["y"].isfinite().all() else {}


@pytest.mark.parametrize("adapted", [False, True])
def test_the_captured_graph_is_exported_where_a_hook_is_in_the_way(*, adapted: bool, tmp_path: Path) -> None:
    x, shift = torch.randn(3, 4), torch.randn(3, 3)
    model: nn.Module = Guarded().eval()
    model.register_forward_hook(refuse_infinite)
    given = model
    if adapted:
        given = ac.compile_with_adapters(model, (x, shift), config=ac.AdapterConfig(rank=2))
        with torch.no_grad():
            for parameter in given.adapters.parameters():
                parameter.normal_(0, 0.4)
        model = given.fold()
    report = ac.export_onnx(given, tmp_path / "model.onnx", (x,), {"shift": shift})
    assert report.strategy == "captured graph, all dimensions open"
    assert (report.inputs, report.outputs, report.frozen) == (("x", "shift"), ("y", "hidden"), ())
    assert report.dynamic_axes == {"x": (0,), "shift": (0,)}
    names = {tensor.name for tensor in onnx.load(report.path).graph.initializer}
    assert names == {"up.weight", "up.bias", "down.weight", "down.bias"}
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    x, shift = torch.randn(5, 4), torch.randn(5, 3)
    found = session.run(["y"], {"x": x.numpy(), "shift": shift.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), model(x, shift)["y"].detach(), rtol=1e-4, atol=1e-5)


def test_a_hook_that_changes_the_result_is_not_lost(tmp_path: Path) -> None:
    """The captured graph lacks it, which verification finds; a trace has it."""
    model = Guarded().eval()
    model.register_forward_hook(double)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(3, 4), torch.randn(3, 3)))
    tried = {attempt.strategy.partition(",")[0]: attempt.reason for attempt in report.attempts}
    assert tried["captured graph"]
    assert tried["TorchScript"] is None
    assert report.outputs == ("y",)


def test_a_model_without_hooks_has_no_such_rung(tmp_path: Path) -> None:
    """What torch.export refuses inside ``forward`` does not capture either, so it is not tried once more."""
    report = ac.export_onnx(Branches(factor=1).eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    tried = {attempt.strategy.partition(",")[0] for attempt in report.attempts}
    assert tried == {"torch.export", "recorded call", "TorchScript"}


class Branches(nn.Module):
    """The branch matters, or only looks as if it did."""

    def __init__(self, *, factor: float) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * self.factor if x.mean() > 0 else y


def test_a_frozen_branch_that_matters_is_found(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="TorchScript, fixed shapes: output output on random values"):
        ac.export_onnx(Branches(factor=2).eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert list(tmp_path.iterdir()) == []


def test_a_frozen_branch_that_does_not_matter_is_told(tmp_path: Path) -> None:
    report = ac.export_onnx(Branches(factor=1).eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert report.strategy.startswith("TorchScript")
    assert len(report.cases) >= 9
    assert any("Python boolean" in reason for reason in report.frozen)
    assert "frozen: " in str(report)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes_that_onnxruntime_has_gaps_in(dtype: torch.dtype, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.LayerNorm(8), nn.Linear(8, 3)).eval().to(dtype)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(4, 6, dtype=dtype),))
    assert report.max_rel_error < 0.05
    assert dtype is not torch.bfloat16 or "Gemm" in report.casts


def test_the_first_node_that_differs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = onnx.checker.check_model

    def damage_then_check(path: str) -> None:
        model = onnx.load(path)
        for tensor in model.graph.initializer:
            if tensor.name == "2.weight":
                values = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(values * 1.01, tensor.name))
        onnx.save(model, path)
        check(path)

    monkeypatch.setattr("adapter_compiler.onnx.translation.fallbacks.onnx.checker.check_model", damage_then_check)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    with pytest.raises(VerificationError, match=r"the first node that differs is node_linear_1 \(\w+, 2\)"):
        ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(3, 4),))


def test_the_file_describes_itself(tmp_path: Path) -> None:
    x = torch.randint(0, 7, (3, 4))
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 2))
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=2))
    with torch.no_grad():
        adapted.adapters.get_parameter("1.weight.lam")[0] = 0
    report = ac.export_onnx(adapted, tmp_path / "model.onnx", (x,))
    stored: dict[str, Any] = {p.key: p.value for p in onnx.load(report.path).metadata_props}
    found = json.loads(stored["adapter_compiler"])
    assert found["adapters"] == "merged"
    assert found["ranks"] == {"1.weight": 1}
    assert len(found["configuration"]) == 64
    assert found["versions"]["torch"] == torch.__version__
    (name,) = report.inputs
    assert found["inputs"][name] == {
        "dtype": "int64",
        "shape": [3, 4],
        "low": float(x.min()),
        "high": float(x.max()),
    }
    assert {key: entry["initializer"] for key, entry in found["weights"].items()} == {
        "0.weight": "0.weight",
        "1.weight": "1.weight",
        "1.bias": "1.bias",
    }


class TwoEqual(nn.Module):
    """Two weights of the same values stay two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        with torch.no_grad():
            self.second.weight.copy_(self.first.weight)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x).relu())
        return y


def test_equal_weights_stay_apart(tmp_path: Path) -> None:
    report = ac.export_onnx(TwoEqual().eval(), tmp_path / "model.onnx", (torch.randn(2, 3),))
    names = {tensor.name for tensor in onnx.load(report.path).graph.initializer}
    assert {"first.weight", "second.weight"} <= names


def test_the_report_is_data_and_text(tmp_path: Path) -> None:
    report = ac.export_onnx(nn.Linear(3, 2).eval(), tmp_path / "model.onnx", (torch.randn(4, 3),))
    assert json.loads(json.dumps(report.to_dict()))["strategy"] == "torch.export, all dimensions open"
    assert report.rows().count("random values") == 3
    assert str(report).count("random values") <= 1  # the worst input may be one of them
    assert "output output: error up to " in str(report)
    assert report.errors[0].argmax_agreement == 1.0


class TakesADerivative(nn.Module):
    """Forces of an energy, with a try that fails first."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.energy = nn.Linear(8, 4), nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        try:
            x = self.wide(x)
        except RuntimeError:
            x = x * 2
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.energy(x).sum(-1)
            (force,) = torch.autograd.grad(energy.sum(), x)
        return energy, -force


def test_the_operators_of_a_call_are_exported_where_torch_export_refuses(tmp_path: Path) -> None:
    model = TakesADerivative().eval()
    report = ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert report.strategy == "recorded call, all dimensions open"
    assert report.dynamic_axes == {"x": (0,)}
    names = {tensor.name for tensor in onnx.load(report.path).graph.initializer}
    assert {"energy.0.weight", "energy.0.bias", "energy.2.weight"} <= names
    assert not any(name.startswith("wide") for name in names)
    energy, force = onnxruntime.InferenceSession(report.path).run(None, {"x": np.ones((5, 4), np.float32)})
    expected = model(torch.ones(5, 4))
    np.testing.assert_allclose(energy, expected[0].detach(), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(force, expected[1].detach(), rtol=1e-4, atol=1e-5)


class Remembers(nn.Module):
    """Adds the mean of the last call."""

    last: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) + self.last
        self.last = y.detach().mean(0)
        return y


def test_a_buffer_that_calls_change_is_told_and_left_as_it_was(tmp_path: Path) -> None:
    model = Remembers().eval()
    report = ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert report.frozen == ("buffer last, which a call of the model changes",)
    assert not model.last.any()
