"""Which dimensions vary together is found by running the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapter_compiler.onnx.translation.varying_sizes import VaryingSizes
from adapter_compiler.onnx.verification.sizes import Place, resize
from passes.capture.calls import ModuleCall, split_call
from passes.compat import pytree

Function = Callable[..., Any]


def search(function: Function, *shapes: Sequence[int]) -> VaryingSizes:
    call = split_call(tuple(torch.randn(tuple(shape)) for shape in shapes), {})

    def run(other: ModuleCall) -> list[Tensor]:
        args, kwargs = other.rebuild(other.tensors)
        result = function(*args, **kwargs)
        return [result] if isinstance(result, Tensor) else list(pytree.tree_leaves(result))

    return VaryingSizes(run, call)


def spell(groups: Sequence[frozenset[Place]]) -> list[str]:
    """``0.1 2.0`` for the second dimension of the first tensor and the first one of the third."""
    return [" ".join(f"{place.tensor}.{place.dimension}" for place in sorted(group)) for group in groups]


LSTM = nn.LSTM(6, 12, batch_first=True)
TIME_FIRST = nn.LSTM(6, 12, num_layers=2)
LINEAR = nn.Linear(4, 5)


def batch_first(x: Tensor, h: Tensor, c: Tensor) -> Any:
    return LSTM(x, (h, c))


def time_first(x: Tensor, h: Tensor, c: Tensor) -> Any:
    return TIME_FIRST(x, (h, c))


def attend(x: Tensor, mask: Tensor) -> Tensor:
    q = x.unflatten(-1, (2, 4)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q, attn_mask=mask).transpose(1, 2).flatten(2)


def batch_last(x: Tensor, state: Tensor) -> Tensor:
    return LINEAR(x).t() + state  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "shapes", "batch", "others"),
    [
        (batch_first, [(3, 5, 6), (1, 3, 12), (1, 3, 12)], "0.0 1.1 2.1", ["0.1"]),
        (batch_first, [(3, 3, 6), (1, 3, 12), (1, 3, 12)], "0.0 1.1 2.1", ["0.1"]),
        (batch_first, [(12, 5, 6), (1, 12, 12), (1, 12, 12)], "0.0 1.1 2.1", ["0.1"]),
        (batch_first, [(1, 1, 6), (1, 1, 12), (1, 1, 12)], "0.0 1.1 2.1", ["0.1"]),
        (time_first, [(5, 3, 6), (2, 3, 12), (2, 3, 12)], "0.1 1.1 2.1", ["0.0"]),
        (time_first, [(2, 2, 6), (2, 2, 12), (2, 2, 12)], "0.1 1.1 2.1", ["0.0"]),
        (time_first, [(1, 1, 6), (2, 1, 12), (2, 1, 12)], "0.1 1.1 2.1", ["0.0"]),
        (attend, [(3, 5, 8), (1, 1, 5, 5)], "0.0", ["0.1 1.2 1.3"]),
        (attend, [(3, 5, 8), (3, 1, 5, 5)], "0.0 1.0", ["0.1 1.2 1.3"]),
        (attend, [(3, 5, 8), (5, 5)], "0.0", ["0.1 1.0 1.1"]),
        (attend, [(2, 2, 8), (2, 1, 2, 2)], "0.0 1.0", ["0.1 1.2 1.3"]),
        (attend, [(3, 1, 8), (1, 1, 1, 1)], "0.0", ["0.1 1.2 1.3"]),
        (batch_last, [(3, 4), (5, 3)], "0.0 1.1", []),
        (batch_last, [(1, 4), (5, 1)], "0.0 1.1", []),
    ],
)
def test_the_batch_and_lengths_are_found(
    function: Function, shapes: list[tuple[int, ...]], batch: str, others: list[str]
) -> None:
    sizes = search(function, *shapes)
    assert spell([sizes.batch]) == [batch]
    visible = [group for group, is_visible in sizes.groups.items() if is_visible]
    assert sorted(spell(visible)) == sorted([batch, *others])


def test_sizes_of_one_are_enlarged_group_by_group() -> None:
    sizes = search(batch_first, (1, 1, 6), (1, 1, 12), (1, 1, 12))
    assert spell(sizes.of_one) == ["0.0 1.1 2.1", "0.1"]
    assert sizes.has_other_ones
    assert [tuple(t.shape) for t in sizes.enlarge(sizes.of_one).tensors] == [(2, 3, 6), (1, 2, 12), (1, 2, 12)]
    assert [tuple(t.shape) for t in sizes.enlarge([sizes.batch]).tensors] == [(2, 1, 6), (1, 2, 12), (1, 2, 12)]


def test_a_size_that_only_happens_to_fit_is_not_taken() -> None:
    """Two heads are also two rows of a mask; three are not."""
    sizes = search(attend, (1, 5, 8), (1, 1, 5, 5))
    assert spell(sizes.of_one) == ["0.0 1.0"]
    assert not sizes.has_other_ones


def test_where_nothing_varies_the_first_dimensions_are_the_batch() -> None:
    def fixed(x: Tensor, y: Tensor) -> Tensor:
        assert x.shape == (2, 3)
        return x + y

    sizes = search(fixed, (2, 3), (2, 3))
    assert sizes.groups == {}
    assert spell([sizes.batch]) == ["0.0 1.0"]


def test_the_model_runs_a_limited_number_of_times() -> None:
    runs = 0

    def refuse(*tensors: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        if any(t.shape != (2, 2) for t in tensors):
            raise ValueError
        return tensors[0]

    sizes = search(refuse, *[(2, 2)] * 30)
    assert spell([sizes.batch]) == [" ".join(f"{i}.0" for i in range(30))]
    assert runs <= 200


def test_resized_values_are_those_of_the_example() -> None:
    call = split_call((torch.arange(6).view(2, 3),), {})
    assert resize(call, {Place(0, 0): 3, Place(0, 1): 2}).tensors[0].tolist() == [[0, 1], [3, 4], [0, 1]]
