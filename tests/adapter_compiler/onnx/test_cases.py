"""The inputs that files are verified on stay within what the example shows."""

from __future__ import annotations

import pytest
import torch

from adapter_compiler.onnx.cases import draw_like, find_cases, shuffle_call
from passes.calls import split_call


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
