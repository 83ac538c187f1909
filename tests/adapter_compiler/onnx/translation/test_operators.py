"""Operators that torch's exporter has no translation for, or a wrong one, are exported and right on onnxruntime."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac

Operators = dict[str, Callable[[Tensor], Tensor]]

INDEX = torch.tensor([[0, 0], [1, 1], [2, 3], [4, 4]])
LABELS = torch.tensor([0, -100, 4, 2])

CUMULATIVE: Operators = {
    "product": lambda x: x.cumprod(1),
    "last dimension": lambda x: x.cumprod(-1),
    "first dimension": lambda x: x.cumprod(0),
    "of integers": lambda x: (x * 3).long().cumprod(1),
    "of integers as floats": lambda x: torch.cumprod((x * 3).long(), 1, dtype=torch.float32),
    "of flags": lambda x: (x > 0).cumprod(1),
    "in float64": lambda x: torch.cumprod(x, 1, dtype=torch.float64),
    "in half precision": lambda x: x.half().cumprod(1),
    "in place": lambda x: (x * 1).cumprod_(1),
    "of a number": lambda x: x.sum().cumprod(0),
    "exclusive": lambda x: torch.cat([torch.ones_like(x[:, :1]), 1 - x.sigmoid()], 1).cumprod(1)[:, :-1],
    "reverse": lambda x: x.flip(1).cumprod(1).flip(1),
    "with zeros": lambda x: x.relu().cumprod(1),
    "of nothing": lambda x: x[:, 5:].cumprod(1).sum(1) + x[:, 0],
    "sum in half precision": lambda x: x.half().cumsum(1),
    "product of all in half precision": lambda x: x.half().prod(1),
    "logsumexp": lambda x: (x * 100).logcumsumexp(1),
    "largest": lambda x: x.cummax(1)[0],
    "place of the largest": lambda x: x.cummax(1)[1],
    "smallest": lambda x: (x * 3).long().cummin(0)[0],
}
OTHERS: Operators = {
    "median": lambda x: x.median(1)[0],
    "median of all": lambda x: x.median(),
    "nanmedian": lambda x: x.log().nanmedian(1)[0],
    "k-th": lambda x: x.kthvalue(2, 1)[0],
    "mode": lambda x: x.round().mode(1)[0],
    "search": lambda x: torch.searchsorted(x.sort(1)[0], x, right=True),
    "membership": lambda x: torch.isin(x.round(), torch.tensor([0.0, 1.0])),
    "stable sort": lambda x: torch.sort(x.round(), stable=True, dim=1)[1],
    "fmax": lambda x: torch.fmax(x.log(), x),
    "erfinv": lambda x: torch.erfinv(x.tanh()),
    "ndtri": lambda x: torch.special.ndtri(x.sigmoid()),
    "digamma": lambda x: torch.digamma(x.abs() + 0.1),
    "hypot": lambda x: torch.hypot(x, x + 1),
    "copysign": lambda x: torch.copysign(x, x.flip(1)),
    "scattered means": lambda x: x.scatter_reduce(1, INDEX, torch.ones(4, 2), "mean"),
    "put": lambda x: x.put(torch.tensor([1, -2]), torch.tensor([9.0, 8.0])),
    "window": lambda x: x * torch.hamming_window(5),
    "mean of integers": lambda x: torch.mean((x * 3).long(), 1, dtype=torch.float32),
    "smoothed labels": lambda x: F.cross_entropy(x, LABELS, label_smoothing=0.1),
    "probabilities": lambda x: F.cross_entropy(x, x.softmax(1)),
    "uneven parts": lambda x: x.chunk(3, 1)[2],
    "powers": lambda x: torch.vander(x[0], 3),
    "shift of zero": lambda x: torch.fft.fftshift(x, 1),
    "pooling": lambda x: F.avg_pool2d(x[None, None], 2, divisor_override=3),
    "largest in windows": lambda x: F.adaptive_max_pool2d(x[None], (2, 3)),
}


class Applies(nn.Module):
    def __init__(self, operators: Operators) -> None:
        super().__init__()
        self.inner, self.operators = nn.Linear(6, 5), operators

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = self.inner(features)
        return {name: operator(x) for name, operator in self.operators.items()}


@pytest.mark.parametrize("operators", [CUMULATIVE, OTHERS], ids=["cumulative", "others"])
def test_operators_without_a_right_translation(operators: Operators, tmp_path: Path) -> None:
    model, x = Applies(operators).eval(), torch.randn(4, 6)
    report = ac.export_onnx(model, tmp_path / "model.onnx", (x,))
    assert report.strategy.startswith("torch.export")
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    other = torch.randn(4, 6)
    expected = model(other).values()
    for name, found, value in zip(operators, session.run(None, {"features": other.numpy()}), expected, strict=True):
        assert torch.from_numpy(found).dtype == value.dtype, name
        tolerance = 1e-2 if value.dtype is torch.float16 else 1e-4
        torch.testing.assert_close(
            torch.from_numpy(found), value.detach(), rtol=tolerance, atol=tolerance, equal_nan=True, msg=name
        )


@pytest.mark.parametrize("rows", [2, 7])
def test_cumulative_products_of_any_length(rows: int, tmp_path: Path) -> None:
    model = Applies({"rows": lambda x: x.cumprod(0), "largest": lambda x: x.cummax(0)[0]}).eval()
    report = ac.export_onnx(model, tmp_path / "model.onnx", (torch.randn(4, 6),))
    assert report.dynamic_axes == {"features": (0,)}
    session, other = onnxruntime.InferenceSession(str(report.path)), torch.randn(rows, 6)
    for found, value in zip(session.run(None, {"features": other.numpy()}), model(other).values(), strict=True):
        torch.testing.assert_close(torch.from_numpy(found), value.detach(), rtol=1e-4, atol=1e-5)


class Passes(nn.Module):
    """Returns arguments as they are, and results under the names of arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, state: Tensor) -> dict[str, Tensor]:
        return {"x": x, "state": self.inner(x) + state, "weight": self.inner.weight, "y": x.contiguous()}


def test_outputs_that_are_called_like_inputs(tmp_path: Path) -> None:
    model, args = Passes().eval(), (torch.randn(3, 4), torch.randn(3, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = ac.export_onnx(model, tmp_path / "model.onnx", args)
    assert report.outputs == ("output.x", "output.state", "weight")
    session = onnxruntime.InferenceSession(str(report.path))
    assert [value.name for value in session.get_inputs()] == ["x", "state"]
    x, state = torch.randn(5, 4), torch.randn(5, 4)
    passed, changed, weight = session.run(list(report.outputs), {"x": x.numpy(), "state": state.numpy()})
    torch.testing.assert_close(torch.from_numpy(passed), x, rtol=0, atol=0)
    torch.testing.assert_close(torch.from_numpy(changed), (model.inner(x) + state).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(weight), model.inner.weight.detach(), rtol=0, atol=0)
