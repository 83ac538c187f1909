"""The arguments of a model change between two calls: types, strides, aliases, numbers, order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.soundness.common import WIDTH, Run, Situation, draw, make, params
from tests.soundness.oracle import check


def compute(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.first(x)))


def asks_requires_grad(net: Any, x: Tensor) -> Any:
    return net.first(x) * 2 if x.requires_grad else net.second(x)


def asks_subclass(net: Any, x: Tensor) -> Any:
    return net.first(x) if type(x) is Tensor else net.second(torch.as_tensor(x).as_subclass(Tensor))


def asks_parameter(net: Any, x: Tensor) -> Any:
    return net.first(x) if isinstance(x, nn.Parameter) else net.second(x)


def asks_contiguity(net: Any, x: Tensor) -> Any:
    return net.first(x) if x.is_contiguous() else net.second(x.contiguous())


def asks_strides(net: Any, x: Tensor) -> Any:
    return net.first(x) * x.stride(0)


def asks_contiguity_of_an_activation(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return y * 2 if y.is_contiguous() else net.second(y)


def asks_strides_of_a_weight(net: Any, x: Tensor) -> Any:
    return net.first(x) * net.first.weight.stride(0) + net.first.weight.t().stride(1)


def asks_identity(net: Any, x: Tensor, y: Tensor) -> Any:
    return net.first(x) if x is y else net.second(x) + y


def writes_one(net: Any, x: Tensor, y: Tensor) -> Any:
    x.mul_(2)
    return net.first(y) + x


def keyword_order(net: Any, x: Tensor, **options: Tensor) -> Any:
    for name, value in options.items():
        x = net.get_submodule(name)(x) * value
    return x


def optional_argument(net: Any, x: Tensor, mask: Tensor | None = None) -> Any:
    return net.first(x) if mask is None else net.second(x * mask)


def nested_arguments(net: Any, batch: dict[str, Any]) -> Any:
    y = net.first(batch["x"])
    for extra in batch["extra"]:
        y = net.second(y) + extra
    return {"y": y, "n": len(batch["extra"])}


def any_arguments(net: Any, *args: Any) -> Any:
    return sum(net.first(x) for x in args) * len(args)


class Tagged(Tensor):
    """A subclass that changes nothing."""


def tagged() -> tuple[Any, ...]:
    return (torch.randn(3, WIDTH).as_subclass(Tagged),)


def transposed() -> tuple[Any, ...]:
    return (torch.randn(WIDTH, 3).t(),)


def strided() -> tuple[Any, ...]:
    return (torch.randn(3, 2 * WIDTH)[:, ::2],)


def expanded() -> tuple[Any, ...]:
    return (torch.randn(1, WIDTH).expand(3, WIDTH),)


def as_parameter() -> tuple[Any, ...]:
    return (nn.Parameter(torch.randn(3, WIDTH)),)


def with_gradient() -> tuple[Any, ...]:
    return (torch.randn(3, WIDTH).requires_grad_(),)


def vector() -> tuple[Any, ...]:
    return (torch.randn(WIDTH),)


def four_dimensions() -> tuple[Any, ...]:
    return (torch.randn(2, 3, 1, WIDTH),)


def empty() -> tuple[Any, ...]:
    return (torch.randn(0, WIDTH),)


def two() -> tuple[Any, ...]:
    return torch.randn(3, WIDTH), torch.randn(3, WIDTH)


def same_twice() -> tuple[Any, ...]:
    x = torch.randn(3, WIDTH)
    return x, x


def overlapping() -> tuple[Any, ...]:
    x = torch.randn(4, WIDTH)
    return x[:3], x[1:]


def batch_of(n: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: ({"x": torch.randn(3, WIDTH), "extra": [torch.randn(3, WIDTH) for _ in range(n)]},)


def with_keywords(*names: str) -> Callable[..., Any]:
    return lambda model, x: model(x, **{name: torch.tensor(i + 1.0) for i, name in enumerate(names)})


def either_order(model: Any, x: Tensor) -> Any:
    return [with_keywords(*names)(model, x) for names in (("first", "second"), ("second", "first"))]


def given(name: str, run: Callable[..., Any], later: Callable[[], tuple[Any, ...]], **options: Any) -> Situation:
    return Situation(name=name, build=make(run), later=later, **options)


OUTSIDE: dict[str, Any] = {"options": {"regions": ("first", "second")}}
KEYWORDS: dict[str, Any] = {"keywords": lambda: {"first": torch.ones(()), "second": torch.ones(())}}

TABLE = [
    given("input-requires-grad", asks_requires_grad, with_gradient),
    given("input-requires-grad-no-more", asks_requires_grad, draw, args=with_gradient),
    given("subclass", asks_subclass, tagged),
    given("subclass-at-first", asks_subclass, draw, args=tagged),
    given("subclass-all-through", compute, tagged),
    given("parameter", asks_parameter, as_parameter),
    given("transposed", asks_contiguity, transposed),
    given("transposed-at-first", asks_contiguity, draw, args=transposed),
    given("strides", asks_strides, strided),
    given("expanded", asks_strides, expanded),
    given("contiguity-of-an-activation", asks_contiguity_of_an_activation, transposed),
    given("strides-of-a-weight", asks_strides_of_a_weight, transposed),
    given("vector", compute, vector),
    given("four-dimensions", compute, four_dimensions),
    given("empty", compute, empty),
    given("double-is-refused", compute, lambda: (torch.randn(3, WIDTH).double(),), raises=True),
    given("width-is-refused", compute, lambda: (torch.randn(3, WIDTH + 1),), raises=True),
    given("same-tensor-twice", asks_identity, same_twice, args=two),
    given("same-tensor-twice-at-first", asks_identity, two, args=same_twice),
    given("same-tensor-written", writes_one, same_twice, args=two, **OUTSIDE),
    given("same-tensor-written-at-first", writes_one, two, args=same_twice, **OUTSIDE),
    given("overlapping-tensors-written", writes_one, overlapping, args=two, **OUTSIDE),
    given("more-in-a-list", nested_arguments, batch_of(3), args=batch_of(1)),
    given("none-in-a-list", nested_arguments, batch_of(0), args=batch_of(2)),
    given("fewer-arguments", any_arguments, draw, args=two),
    given("argument-left-out", optional_argument, draw, args=two),
    given("argument-added", optional_argument, two),
    Situation(name="keyword-order", build=make(keyword_order), call=with_keywords("second", "first"), **KEYWORDS),
    Situation(name="keyword-orders", build=make(keyword_order), call=either_order, **KEYWORDS),
]  # fmt: skip


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_arguments(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)
