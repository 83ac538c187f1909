"""Capture: what the graph shares with the module, the sizes that it accepts, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.base import CaptureError
from passes.capture.calls import split_call
from passes.capture.capture import capture_call


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(self.norm(self.linear(x)))
        return y


def test_graphs_refer_to_the_modules_own_weights() -> None:
    module = Net()
    graph_module = capture_call(module, split_call((torch.randn(3, 4),), {})).graph_module
    for name, parameter in module.named_parameters():
        assert graph_module.get_parameter(f"module.{name}") is parameter
    for name, buffer in module.named_buffers():
        assert graph_module.get_buffer(f"module.{name}") is buffer


def test_capture_does_not_change_buffers_modes_and_random_state() -> None:
    module = Net()
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
    state = torch.get_rng_state()
    captured = capture_call(module, split_call((torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),), {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in module.named_buffers())
    assert module.training
    assert captured.largest_error <= 1e-5


def test_the_batch_is_symbolic_but_never_one() -> None:
    captured = capture_call(nn.Linear(4, 2), split_call((torch.randn(3, 4),), {}))
    assert captured.dynamic == "all"
    assert captured.accepts((torch.randn(9, 4),))
    assert not captured.accepts((torch.randn(9, 5),))
    assert not captured.accepts((torch.randn(1, 4),))


def test_dimensions_that_must_agree_are_guarded() -> None:
    class Adds(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return x + y

    captured = capture_call(Adds(), split_call((torch.randn(3, 4), torch.randn(3, 4)), {}))
    assert captured.accepts((torch.randn(5, 6), torch.randn(5, 6)))
    assert not captured.accepts((torch.randn(5, 6), torch.randn(4, 6)))


def test_branches_on_sizes_are_guarded() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[1] > 8 else x * 3

    short = capture_call(Branches(), split_call((torch.randn(3, 5),), {}))
    assert short.accepts((torch.randn(3, 8),))
    assert not short.accepts((torch.randn(3, 9),))


class Decides(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2 if x.sum() > 0 else x


class Reads(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.max())


@pytest.mark.parametrize("model", [Decides(), Reads()], ids=["branch", "factor"])
def test_python_that_depends_on_values_is_refused_with_the_reason(model: nn.Module) -> None:
    with pytest.raises(CaptureError) as caught:
        capture_call(model, split_call((torch.ones(3, 4),), {}))
    message = str(caught.value)
    assert f"{type(model).__name__} does not capture as one graph" in message
    assert "values" in message


class Spells(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * len(str(int(x.sum())))


class Repeats(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(int(x.sum().item())):
            x = x + 1
        return x


@pytest.mark.parametrize("model", [Spells(), Repeats()], ids=["text", "loop"])
def test_a_value_that_export_would_freeze_is_refused(model: nn.Module) -> None:
    with pytest.raises(CaptureError, match="values"):
        capture_call(model, split_call((torch.ones(3, 4),), {}))


class Indexes(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * x.max().item()


def test_a_value_that_stays_a_symbol_is_captured() -> None:
    captured = capture_call(Indexes(), split_call((torch.ones(3, 4),), {}))
    x = torch.randn(3, 4)
    torch.testing.assert_close(captured.graph_module(x)[0], Indexes()(x))


class OtherWhenExported(nn.Module):
    """Takes a path during export that does not work, as in models that nobody has exported."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            raise ValueError("this was never tried")
        return x * 2


def test_a_module_that_fails_only_when_it_is_exported_is_refused() -> None:
    with pytest.raises(CaptureError, match="this was never tried"):
        capture_call(OtherWhenExported(), split_call((torch.ones(3, 4),), {}))


class MovesItsLayer(nn.Module):
    """Moves a layer to its dtype at each call, as routers do."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner.to(torch.float32)(x.to(dtype=torch.float32))
        return y


def test_a_module_that_moves_a_layer_to_its_own_dtype_is_captured() -> None:
    model, x = MovesItsLayer(), torch.randn(3, 4)
    captured = capture_call(model, split_call((x,), {}))
    torch.testing.assert_close(captured.graph_module(x)[0], model(x))
    assert nn.Linear(4, 4).to(torch.float64).weight.dtype is torch.float64


class Counts(nn.Module):
    """Uses the number of its calls, which is state outside the module that a graph cannot have."""

    def __init__(self, result: str, calls: list[int]) -> None:
        super().__init__()
        self.result = result
        self.count = calls.append
        self.read = calls.__len__
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, int]:
        self.count(1)
        if self.result == "tensor":
            return x + self.read()
        if self.result == "number":
            return x * 2, self.read()
        self.get_buffer("total").add_(self.read())
        return x * 2


@pytest.mark.parametrize(
    ("result", "where"),
    [("tensor", "output 0"), ("number", "output 1"), ("buffer", "buffer total")],
)
def test_a_graph_that_differs_from_eager_is_refused(result: str, where: str) -> None:
    module = Counts(result, [])
    with pytest.raises(CaptureError, match=rf"Counts: {where} of the captured graph .* eager"):
        capture_call(module, split_call((torch.randn(3, 4),), {}))
    assert float(module.get_buffer("total")) == 0


def test_the_models_own_error_is_raised_unchanged() -> None:
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture_call(nn.Linear(4, 2), split_call((torch.randn(3, 5),), {}))


def test_a_surrounding_autocast_region_is_not_part_of_the_graph() -> None:
    module, x = nn.Linear(4, 2), torch.randn(3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        captured = capture_call(module, split_call((x,), {}))
        assert captured.graph_module(x)[0].dtype == torch.bfloat16
    assert captured.graph_module(x)[0].dtype == torch.float32


def test_equal_nan_outputs_do_not_differ() -> None:
    class Undefined(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x * 0.0) / (x * 0.0)

    captured = capture_call(Undefined(), split_call((torch.randn(3, 4),), {}))
    assert captured.largest_error == 0.0
