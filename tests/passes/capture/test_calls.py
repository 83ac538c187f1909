"""Calls are flattened and rebuilt; which calls share a graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from passes.base import CaptureError
from passes.capture.calls import flatten_result, sort_keywords, split_call

X = torch.arange(6.0).reshape(2, 3)


def test_tensors_names_and_rebuilding() -> None:
    call = split_call((X, [X + 1, None, 3]), {"mask": {"inner": X > 2}, "flag": True})
    assert call.names == ("args[0]", "args[1][0]", "mask['inner']")
    assert call.positions == (0, 1, 4)
    args, kwargs = call.rebuild([X * 2, X * 3, X < 0])
    assert torch.equal(args[0], X * 2)
    assert torch.equal(args[1][0], X * 3)
    assert args[1][1:] == [None, 3]
    assert kwargs["flag"] is True
    assert torch.equal(kwargs["mask"]["inner"], X < 0)


def key(*args: Any, **kwargs: Any) -> Any:
    return split_call(args, sort_keywords(kwargs)).key


def test_shapes_and_keyword_order_are_not_part_of_the_key() -> None:
    assert key(X) == key(torch.randn(7, 9))
    assert key(a=X, b=True) == key(b=True, a=X)
    assert hash(key(X, a=1)) == hash(key(X, a=1))


@pytest.mark.parametrize(
    "other",
    [
        key(X.double(), 1),
        key(X[0], 1),
        key(X, 2),
        key(X, True),
        key(X, 1.0),
        key(X, None),
        key([X], 1),
        key(X, flag=1),
        key(X.t(), 1),
    ],
    ids=["dtype", "rank", "value", "bool is not int", "float is not int", "None", "nesting", "keyword", "layout"],
)
def test_differences_that_change_the_key(other: Any) -> None:
    assert key(X, 1) != other


@dataclasses.dataclass
class Unregistered:
    """Cannot be rebuilt from its fields."""

    x: torch.Tensor
    size: int = dataclasses.field(init=False, default=3)


@dataclasses.dataclass(frozen=True)
class Inner:
    ids: torch.Tensor
    scale: float = 2.0


@dataclasses.dataclass
class Outer:
    inner: list[Inner]
    x: torch.Tensor


def test_dataclasses_are_taken_apart_and_put_together() -> None:
    call = split_call((Outer([Inner(X.long()), Inner(X.long(), 3.0)], X),), {})
    assert call.names == ("args[0].inner[0].ids", "args[0].inner[1].ids", "args[0].x")
    args, _ = call.rebuild([tensor + 1 for tensor in call.tensors])
    assert isinstance(args[0], Outer)
    assert torch.equal(args[0].inner[1].ids, X.long() + 1)
    assert [one.scale for one in args[0].inner] == [2.0, 3.0]
    assert key(Outer([Inner(X)], X)) != key(Outer([Inner(X, 3.0)], X))


@pytest.mark.parametrize("where", ["args[1]", "batch"])
def test_unknown_arguments_are_refused_by_place_and_class(where: str) -> None:
    args, kwargs = ((X, Unregistered(X)), {}) if where == "args[1]" else ((X,), {"batch": Unregistered(X)})
    with pytest.raises(CaptureError) as caught:
        split_call(args, kwargs)
    message = str(caught.value)
    assert f"argument {where} is a " in message
    assert "Unregistered, expected tensors" in message
    assert "register_dataclass" in message


def test_unknown_results_are_refused() -> None:
    with pytest.raises(CaptureError, match=r"result \['out'\] is a .*Unregistered"):
        flatten_result({"out": Unregistered(X)})
    leaves, _ = flatten_result({"out": X, "none": None, "n": 3})
    assert len(leaves) == 3
