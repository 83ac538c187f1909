"""The inputs that files are verified on stay within what the example shows."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from adapter_compiler.onnx.verification.cases import draw_like, find_cases, shuffle_call
from passes.capture.calls import split_call
from passes.capture.capture import DimensionBound


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize(
    "example", [torch.randn(40, 50), torch.randint(-3, 60, (40, 50)), torch.randn(20, 30).double()]
)
def test_values_stay_in_the_range_of_the_example(example: torch.Tensor, generator: torch.Generator) -> None:
    drawn = draw_like(example, generator)
    assert (drawn.shape, drawn.dtype) == (example.shape, example.dtype)
    assert example.min() <= drawn.min() < drawn.max() <= example.max()
    assert not torch.equal(drawn, example)


def test_means_move_from_draw_to_draw(generator: torch.Generator) -> None:
    means = torch.stack([draw_like(torch.linspace(-1, 1, 100), generator).mean() for _ in range(8)])
    assert means.min() < 0 < means.max()
    constant = torch.stack([draw_like(-torch.ones(100), generator).mean() for _ in range(8)])
    assert constant.min() < 0 < constant.max()


def test_flags_keep_their_rows(generator: torch.Generator) -> None:
    mask = (torch.arange(6) < torch.arange(1, 7)[:, None]).long()
    drawn = draw_like(mask, generator)
    assert sorted(drawn.sum(1).tolist()) == sorted(mask.sum(1).tolist())
    assert torch.equal(drawn, drawn.sort(1, descending=True).values)


def test_shuffled_tensors_stay_aligned(generator: torch.Generator) -> None:
    ids = torch.arange(12).reshape(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    shuffled = shuffle_call(split_call((), {"ids": ids, "labels": ids * 2, "mask": mask}), generator)
    found = dict(zip(shuffled.names, shuffled.tensors, strict=True))
    assert torch.equal(found["labels"], found["ids"] * 2)
    rows = found["ids"].div(4, rounding_mode="floor")[:, 0]
    assert torch.equal(found["mask"], mask[rows])


def test_scaled_values_come_last() -> None:
    call = split_call((torch.ones(2, 3) * torch.tensor([1.0, 2.0, 4.0]), torch.tensor([3, 5])), {})
    cases = list(find_cases(call, ((), ()), draws=2, factors=(-1.0,)))
    assert [case.name for case in cases] == ["example", "random values 1", "random values 2", "values times -1"]
    assert torch.equal(cases[-1].call.tensors[0], -call.tensors[0])
    assert torch.equal(cases[-1].call.tensors[1], call.tensors[1])


def open_bound(symbol: str | None, size: int) -> DimensionBound:
    least, greatest = (size, size) if symbol is None else (2, float("inf"))
    return DimensionBound(symbol=symbol, least=int(least), greatest=greatest)


def name_cases(shapes: Mapping[str, tuple[int, ...]], symbols: Mapping[str, tuple[str | None, ...]]) -> list[str]:
    call = split_call((), {name: torch.rand(shape) for name, shape in shapes.items()})
    bounds = [
        tuple(open_bound(symbol, size) for symbol, size in zip(symbols[name], shapes[name], strict=True))
        for name in call.names
    ]
    return [case.name for case in find_cases(call, bounds, draws=0)]


def test_inputs_that_cannot_follow_are_named() -> None:
    shapes = {"ids": (2, 7), "pixels": (2, 3)}
    both = name_cases(shapes, {"ids": ("a", "b"), "pixels": ("c", None)})
    assert both == ["example", "batch 3", "dimension 1 of size 8"]
    one = name_cases(shapes, {"ids": ("a", "b"), "pixels": (None, None)})
    assert one == ["example", "batch 3 (pixels kept at 2)", "dimension 1 of size 8"]


def test_batches_of_their_own_are_told_apart() -> None:
    """Sizes of 1 and of 2 both become 3."""
    names = name_cases({"ids": (2, 7), "pixels": (1, 3)}, {"ids": ("a", None), "pixels": ("b", None)})
    assert names == ["example", "batch 3 (pixels kept at 1)", "batch 3 (ids kept at 2)"]


def test_long_lists_are_cut_short() -> None:
    shapes: dict[str, tuple[int, ...]] = {"ids": (2, 7), **{f"past{i}": (4, 7) for i in range(5)}}
    symbols: dict[str, tuple[str | None, ...]] = dict.fromkeys(shapes, (None, None))
    names = name_cases(shapes, {**symbols, "ids": ("a", None)})
    assert names == ["example", "batch 3 (past0 kept at 4, 4 more)"]
