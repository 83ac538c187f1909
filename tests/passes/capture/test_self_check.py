"""A graph and eager code are compared by outputs, buffers and gradients; what a graph cannot repeat is refused."""

from __future__ import annotations

import copy
import random
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from passes.base import CaptureError
from passes.capture.calls import ModuleCall, flatten_result, split_call
from passes.capture.self_check import (
    TOLERANCES,
    Observation,
    assert_same,
    change_values,
    is_identical,
    observe_eager,
    observe_run,
)

X = torch.linspace(-1, 1, 6).reshape(3, 2)


def call_of(*args: Any) -> ModuleCall:
    return split_call(args, {})


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.dropout(self.norm(self.linear(x))), 7


def test_an_observation_has_outputs_buffers_and_gradients() -> None:
    module = Plain()
    seen = observe_eager(module, call_of(X))
    assert seen.keys() == {
        "output 0",
        "output 1",
        "buffer norm.running_mean",
        "buffer norm.running_var",
        "buffer norm.num_batches_tracked",
        "gradient linear.weight",
        "gradient linear.bias",
        "gradient norm.weight",
        "gradient norm.bias",
    }
    assert seen["output 1"] == 7
    assert seen["buffer norm.num_batches_tracked"] == 1
    assert seen["gradient linear.weight"].abs().sum() > 0


def test_observing_leaves_everything_as_it_was() -> None:
    module, x = Plain(), X.clone().requires_grad_()
    module.linear.weight.requires_grad_(False)
    module.linear.bias.grad = torch.ones(2)
    before, gradient, state = copy.deepcopy(module.state_dict()), module.linear.bias.grad, torch.get_rng_state()
    observe_eager(module, call_of(x))
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert not module.linear.weight.requires_grad
    assert module.linear.weight.grad is None
    assert module.linear.bias.grad is gradient
    assert x.grad is None and x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)


def test_two_observations_of_a_random_module_are_equal() -> None:
    module = Plain()
    first, second = observe_eager(module, call_of(X)), observe_eager(module, call_of(X))
    assert assert_same("Plain", first, second) == 0.0


def observe_variant(module: nn.Module, run: Any) -> Observation:
    call = call_of(X)
    return observe_run(module, call, lambda: flatten_result(run(X))[0])


@pytest.mark.parametrize("dtype", list(TOLERANCES))
def test_the_tolerance_of_each_dtype(dtype: torch.dtype) -> None:
    rtol, atol = TOLERANCES[dtype]
    want = torch.ones(4, dtype=dtype)
    near, far = want + 0.5 * (rtol + atol), want + 4 * (rtol + atol)
    largest = assert_same("M", {"output 0": near}, {"output 0": want})
    assert largest == pytest.approx(float((near - want).abs().max()))
    assert largest > 0
    with pytest.raises(CaptureError, match=r"M: output 0 of the captured graph .*eager"):
        assert_same("M", {"output 0": far}, {"output 0": want})


@pytest.mark.parametrize(
    "found",
    [torch.zeros(2), torch.zeros(3, dtype=torch.float64), torch.tensor([0.0, 0.0, torch.nan])],
    ids=["shape", "dtype", "nan"],
)
def test_other_kinds_of_difference(found: Tensor) -> None:
    with pytest.raises(CaptureError, match="output 0"):
        assert_same("M", {"output 0": found}, {"output 0": torch.zeros(3)})


@pytest.mark.parametrize(
    ("found", "want", "by"),
    [
        (torch.tensor([True, False]), torch.tensor([False, False]), "1"),
        (torch.tensor([1, 255], dtype=torch.uint8), torch.tensor([1, 0], dtype=torch.uint8), "255"),
        (torch.tensor([1j, 3.0]), torch.tensor([1j, 3 + 4j]), "4"),
        (torch.tensor([torch.inf, 1.0]), torch.tensor([torch.inf, 3.0]), "2"),
    ],
    ids=["bool", "uint8", "complex", "infinite"],
)
def test_the_size_of_a_difference_is_in_the_message(found: Tensor, want: Tensor, by: str) -> None:
    with pytest.raises(CaptureError, match=f"by up to {by} beyond"):
        assert_same("M", {"output 0": found}, {"output 0": want})


def test_integers_must_be_equal_and_plain_values_too() -> None:
    assert (
        assert_same(
            "M",
            {"output 0": torch.tensor([1, 2]), "output 1": "a"},
            {"output 0": torch.tensor([1, 2]), "output 1": "a"},
        )
        == 0
    )
    with pytest.raises(CaptureError, match="by up to 1"):
        assert_same("M", {"output 0": torch.tensor([1, 3])}, {"output 0": torch.tensor([1, 2])})
    with pytest.raises(CaptureError, match=re.escape("M: output 1 of the captured graph is 'b', eager gives 'a'")):
        assert_same("M", {"output 1": "b"}, {"output 1": "a"})


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 5


def test_a_difference_in_backward_only_is_found() -> None:
    module = nn.Linear(2, 2)
    expected = observe_variant(module, lambda x: module(x) * 2)
    found = observe_variant(module, lambda x: WrongBackward.apply(module(x)))  # type: ignore[no-untyped-call]
    assert torch.equal(found["output 0"], expected["output 0"])
    with pytest.raises(
        CaptureError, match=r"M: gradient (weight|bias) through the captured graph .* autograd\.Function"
    ):
        assert_same("M", found, expected)


def test_a_gradient_that_is_missing_on_one_side_is_found() -> None:
    module = nn.Linear(2, 2)
    expected = observe_variant(module, module)
    found = observe_variant(module, lambda x: module(x).detach())
    with pytest.raises(CaptureError, match=r"gradient (weight|bias)"):
        assert_same("M", found, expected)


def test_gradients_of_large_parameters_are_left_out_but_not_of_the_smallest() -> None:
    large = nn.Linear(200, 200, bias=False)
    assert "gradient weight" in observe_eager(large, call_of(torch.ones(1, 200)))
    both = nn.Sequential(large, nn.Linear(200, 2))
    seen = observe_eager(both, call_of(torch.ones(1, 200)))
    assert {name for name in seen if name.startswith("gradient")} == {"gradient 1.weight", "gradient 1.bias"}


def test_a_module_without_backward_is_compared_forward_only() -> None:
    class NoBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 2

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            raise NotImplementedError

    module = nn.Linear(2, 2)
    seen = observe_variant(module, lambda x: NoBackward.apply(module(x)))  # type: ignore[no-untyped-call]
    assert list(seen) == ["output 0"]


class Counting(nn.Module):
    """Keeps something between calls; ``effect`` says what."""

    def __init__(self, effect: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.effect = effect
        self.calls = 0
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        if self.effect == "counts":
            self.calls += 1
        elif self.effect == "caches":
            self.cache.setdefault("scale", torch.ones(()))
        elif self.effect == "caches an input":
            self.cache.setdefault("scale", x.abs().mean())
        elif self.effect == "draws":
            y *= random.random()
        elif self.effect == "trains":
            with torch.no_grad():
                self.linear.bias.add_(1)
        return y * self.cache.get("scale", torch.ones(()))


@pytest.mark.parametrize(
    ("effect", "message"),
    [
        ("counts", "Counting changes its attribute calls, which a graph would not"),
        ("caches an input", "Counting changes its attribute cache, which a graph would not"),
        ("draws", "Counting draws from the generator of Python's random module, which a graph would not"),
        ("trains", "Counting changes its parameter linear.bias in place, which a graph would not"),
    ],
)
def test_state_that_a_graph_cannot_change_is_refused(effect: str, message: str) -> None:
    module = Counting(effect)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(CaptureError, match=message):
        observe_eager(module, call_of(X))
    assert (module.calls, module.cache) == (0, {})
    assert effect == "trains" or all(torch.equal(v, before[n]) for n, v in module.state_dict().items())


def test_a_cache_without_effect_is_accepted_and_removed() -> None:
    module = Counting("caches")
    assert "output 0" in observe_eager(module, call_of(X))
    assert module.cache == {}


class Filling(nn.Module):
    def forward(self, x: Tensor, out: list[Any]) -> Tensor:
        out[0] = x * 2
        return x * 3


def test_values_put_into_the_arguments_are_refused() -> None:
    with pytest.raises(CaptureError, match="its arguments"):
        observe_eager(Filling(), call_of(X, [X + 1]))


def test_changed_values_are_other_values_of_the_same_kind() -> None:
    assert torch.equal(change_values(X), X * 0.5)
    assert torch.equal(change_values(torch.tensor([4, 2, 9])), torch.tensor([2, 2, 2]))
    flags, none = torch.tensor([True, False]), torch.zeros(0, dtype=torch.int64)
    assert torch.equal(change_values(flags), flags) and change_values(flags) is not flags
    assert change_values(none).shape == (0,)


def test_identical_values() -> None:
    nan = torch.tensor([1.0, torch.nan])
    assert is_identical(nan, nan.clone())
    assert not is_identical(nan, torch.tensor([torch.nan, 1.0]))
    assert not is_identical(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not is_identical(torch.zeros(2), torch.zeros(1))
    assert not is_identical(1, True)
    assert not is_identical(torch.ones(()), 1)
    assert is_identical(("a", 1), ("a", 1))
