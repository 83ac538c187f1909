"""Dimensions that the report calls open are open, wherever the batch stands; all others are fixed in the file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.onnx import verify_onnx
from passes.compat import pytree

#: Makes the arguments of a call with a batch and a length.
Make = Callable[[int, int], tuple[Any, ...]]


class Recurrent(nn.Module):
    """Takes its state, one tensor or two, and gives it back."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer, self.head = layer, nn.Linear(layer.hidden_size * (1 + layer.bidirectional), 2)

    def forward(self, x: Tensor, state: Any) -> Any:
        y, state = self.layer(x, state)
        return self.head(y), state


class Separate(Recurrent):
    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> Any:  # type: ignore[override]
        y, (h, c) = self.layer(x, (h, c))
        return self.head(y), h, c


class Attention(nn.Module):
    """With a cache of earlier keys and values, if it is given one."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(8, 24)

    def forward(self, x: Tensor, mask: Tensor, past: tuple[Tensor, Tensor] | None = None) -> Any:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in self.project(x).chunk(3, -1))
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            mask = (1 - mask[:, None, None, :]) * -1e4
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return y if past is None else (y, (k, v))


class BatchLast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 5)

    def forward(self, x: Tensor, state: Tensor) -> Any:
        h = torch.tanh(self.inner(x) + self.outer(state.t()))
        return h, h.t()


R = torch.randn
MODELS: dict[str, tuple[Callable[[], nn.Module], Make]] = {
    "lstm": (
        lambda: Separate(nn.LSTM(6, 12, batch_first=True)),
        lambda n, t: (R(n, t, 6), R(1, n, 12), R(1, n, 12)),
    ),
    "lstm, state in a tuple": (
        lambda: Recurrent(nn.LSTM(6, 12, num_layers=2, bidirectional=True)),
        lambda n, t: (R(t, n, 6), (R(4, n, 12), R(4, n, 12))),
    ),
    "gru": (lambda: Recurrent(nn.GRU(6, 12)), lambda n, t: (R(t, n, 6), R(1, n, 12))),
    "rnn": (lambda: Recurrent(nn.RNN(6, 12, batch_first=True)), lambda n, t: (R(n, t, 6), R(1, n, 12))),
    "one mask for all": (Attention, lambda n, t: (R(n, t, 8), torch.ones(1, 1, t, t).tril().log())),
    "cache": (
        Attention,
        lambda n, t: (R(n, t, 8), torch.ones(n, 2 * t + 2), (R(n, 2, t + 2, 4), R(n, 2, t + 2, 4))),
    ),
    "batch last": (BatchLast, lambda n, t: (R(n, 4), R(5, n))),
}

BATCH, ANY = [(3, 4), (1, 4), (5, 4)], [(3, 4), (1, 4), (5, 4), (3, 7), (2, 2)]


@pytest.mark.parametrize(
    ("name", "example", "axes", "others"),
    [
        ("lstm", (3, 4), {"x": (0,), "h": (1,), "c": (1,)}, BATCH),
        ("lstm", (1, 1), {"x": (0,), "h": (1,), "c": (1,)}, [(1, 1), (4, 1)]),
        ("lstm, state in a tuple", (3, 4), {"x": (1,), "state.0": (1,), "state.1": (1,)}, BATCH),
        ("gru", (3, 1), {"x": (1,), "state": (1,)}, [(3, 1), (1, 1), (5, 1)]),
        ("rnn", (3, 4), {"x": (0,), "state": (1,)}, BATCH),
        ("one mask for all", (3, 4), {"x": (0, 1), "mask": (2, 3)}, ANY),
        ("cache", (3, 4), {"x": (0, 1), "mask": (0, 1), "past.0": (0, 2), "past.1": (0, 2)}, ANY),
        ("batch last", (1, 1), {"x": (0,), "state": (1,)}, [(1, 1), (4, 1)]),
    ],
)
def test_files_run_at_all_sizes_that_are_called_open(
    name: str, example: tuple[int, int], axes: dict[str, tuple[int, ...]], others: list[tuple[int, int]], tmp_path: Path
) -> None:
    build, make = MODELS[name]
    model = build().eval()
    report = ac.export_onnx(model, tmp_path / "model.onnx", make(*example))
    assert report.dynamic_axes == axes
    assert report.not_verified == ()
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    declared = {
        value.name: tuple(i for i, size in enumerate(value.shape) if not isinstance(size, int))
        for value in session.get_inputs()
    }
    assert declared == axes
    for sizes in others:
        args = make(*sizes)
        feeds = {name: tensor.numpy() for name, tensor in zip(report.inputs, pytree.tree_leaves(args), strict=True)}
        for found, expected in zip(session.run(None, feeds), pytree.tree_leaves(model(*args)), strict=True):
            torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-4, atol=1e-5)


def test_lengths_that_depend_on_each_other_are_verified_together(tmp_path: Path) -> None:
    build, make = MODELS["cache"]
    report = ac.export_onnx(build().eval(), tmp_path / "model.onnx", make(3, 4))
    assert report.cases[1:4] == (
        "batch 4",
        "dimension 1 of size 5 and mask 11",
        "dimension 2 of size 7 and mask 11",
    )
    assert report.sizes["x"][:2] == ("batch", "sequence")
    assert "input x: batch × sequence" in str(report)
    assert "open dimensions: none" not in str(report)


class Fixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x.reshape(3, 4))
        return y


def test_a_file_without_open_dimensions_is_not_called_open(tmp_path: Path) -> None:
    report = ac.export_onnx(Fixed().eval(), tmp_path / "model.onnx", (torch.randn(3, 4),))
    assert (report.strategy, report.dynamic) == ("torch.export, fixed shapes", "none")
    assert report.dynamic_axes == {"x": ()}
    assert "open dimensions: none" in str(report)


class ThreeLengths(nn.Module):
    """Only one length of the first input is possible, which an exporter does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, z: Tensor) -> Tensor:
        torch._check(x.shape[1] + y.shape[1] == z.shape[1] + 4)
        torch._check(x.shape[1] + z.shape[1] == y.shape[1] + 2)
        inner: Tensor = self.inner(x)
        return inner.sum(1) + y.sum(1) * z.sum(1)


class Halves(nn.Module):
    """Lengths that are multiples of two, and of each other."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        pairs: Tensor = x.unflatten(1, (-1, 2))
        return pairs.mean(2) * y


class Longest(nn.Module):
    """The example has the largest length."""

    def __init__(self) -> None:
        super().__init__()
        self.positions = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[1] > 6:
            raise ValueError("too long")
        return x + self.positions[: x.shape[1]]


class Labelled(nn.Module):
    """Rows of another kind, by coincidence as many as the batch has, so that not all of these can be resized."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(12, 4)

    def forward(self, x: Tensor, table: Tensor) -> Tensor:
        y: Tensor = self.inner(table.flatten())
        return x + y


FLAT = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
SIZES: dict[str, tuple[nn.Module, tuple[Tensor, ...], dict[str, tuple[int, ...]]]] = {
    "flattened": (FLAT, (R(4, 8, 8),), {"input": (0,)}),
    "three lengths": (ThreeLengths(), (R(2, 3, 4), R(2, 5, 4), R(2, 4, 4)), {"x": (0,), "y": (0, 1), "z": (0, 1)}),
    "halves": (Halves(), (R(3, 8), R(3, 4)), {"x": (0, 1), "y": (0, 1)}),
    "longest": (Longest(), (R(3, 6, 4),), {"x": (0, 1)}),
    "labelled": (Labelled(), (R(3, 4), R(3, 4)), {"x": (0,), "table": (0,)}),
}


@pytest.mark.parametrize("name", SIZES)
def test_dimensions_with_one_possible_size_are_fixed_in_the_file(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, args, axes = SIZES[name]
    report = ac.export_onnx(model.eval(), tmp_path / "model.onnx", args)
    assert report.dynamic_axes == axes
    assert report.not_verified == ()
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    for value, tensor in zip(session.get_inputs(), args, strict=True):
        closed = {i: size for i, size in enumerate(value.shape) if isinstance(size, int)}
        assert closed == {i: size for i, size in enumerate(tensor.shape) if i not in axes[value.name]}
    assert verify_onnx(report.path, model, args).not_verified == ()
