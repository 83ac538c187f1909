"""Each decomposition gives what PyTorch's operator gives, or leaves the operator to its own translation."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.export.decompose_exports import find_rules
from passes.export.decompositions import cumulative, functions, layers, layouts, ordering, products, reductions
from passes.export.fold_constant_sizes import FoldConstantSizesPass

Function = Callable[..., Any]
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def draw(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    if dtype is torch.bool:
        return torch.rand(tuple(shape)) < 0.7
    return (
        torch.randn(tuple(shape)).to(dtype) if dtype.is_floating_point else torch.randint(-3, 4, tuple(shape)).to(dtype)
    )


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) in (Tensor, tuple, list)
    for one, other in zip(
        [found] if isinstance(found, Tensor) else found,
        [expected] if isinstance(expected, Tensor) else expected,
        strict=True,
    ):
        assert one.dtype == other.dtype
        assert one.shape == other.shape
        is_half = one.dtype in (torch.float16, torch.bfloat16)
        rtol, atol = (2e-2, 2e-2) if is_half else (1e-5, 1e-6) if one.dtype is not torch.float64 else (1e-9, 1e-12)
        torch.testing.assert_close(one, other, rtol=rtol, atol=atol, equal_nan=True)


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool])
@pytest.mark.parametrize(
    ("shape", "dim"), [((3, 7), 1), ((3, 8), -1), ((5, 2, 3), 0), ((1, 4), 0), ((0, 4), 0), ((2, 0), 1), ((), 0)]
)
def test_cumulative_products(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    x = draw(shape, torch.int64).abs().to(dtype) if dtype is torch.uint8 else draw(shape, dtype)
    assert_same(cumulative.multiply_up(x, dim), torch.cumprod(x, dim))
    assert_same(cumulative.multiply_up(x, dim, dtype=torch.float64), torch.cumprod(x, dim, dtype=torch.float64))


@pytest.mark.parametrize("scale", [1.0, 1000.0])
@pytest.mark.parametrize(("shape", "dim"), [((3, 7), 1), ((5, 2, 3), 0), ((), 0)])
def test_cumulative_logarithms_of_sums(scale: float, shape: tuple[int, ...], dim: int) -> None:
    x = scale * draw(shape)
    if x.dim() == 2:
        x[0, :3] = -torch.inf
        x[1, 2] = torch.inf
    assert_same(cumulative.add_exponentials_up(x, dim), torch.logcumsumexp(x, dim))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
@pytest.mark.parametrize(("shape", "dim"), [((3, 9), 1), ((5, 2, 3), -3), ((), 0)])
def test_cumulative_extremes(dtype: torch.dtype, shape: tuple[int, ...], dim: int) -> None:
    x = draw(shape, dtype)
    assert_same(cumulative.find_largest_up_to(x, dim), tuple(torch.cummax(x, dim)))
    assert_same(cumulative.find_smallest_up_to(x, dim), tuple(torch.cummin(x, dim)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    x = draw((3, 5), dtype)
    assert_same(cumulative.add_up(x, 1), x.cumsum(1))
    assert_same(reductions.multiply_all(x), x.prod())
    assert_same(reductions.multiply_all(x, 1, True), x.prod(1, keepdim=True))
    assert cumulative.add_up(x.float(), 1) is NotImplemented
    assert reductions.multiply_all(x.float(), 1) is NotImplemented


def test_means_in_another_dtype() -> None:
    x = draw((3, 5), torch.int64)
    assert_same(reductions.average_as(x, [1], dtype=torch.float32), x.mean(1, dtype=torch.float32))
    assert_same(reductions.average_as(x, dtype=torch.float64), x.mean(dtype=torch.float64))
    assert reductions.average_as(x.float(), [1]) is NotImplemented


@pytest.mark.parametrize("count", [None, 2, 4])
def test_powers(count: int | None) -> None:
    x = draw((2, 3), torch.float64)
    assert_same(cumulative.make_powers(x, N=count), torch.linalg.vander(x, N=count))
    assert_same(cumulative.make_vandermonde(x[0], count), torch.vander(x[0], count))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize(("shape", "dim"), [((3, 7), 1), ((3, 8), -1), ((5, 2, 3), 0), ((), 0)])
def test_order_statistics(shape: tuple[int, ...], dim: int, keepdim: bool) -> None:
    x = torch.randperm(max(1, draw(shape).numel())).reshape(shape).float()
    assert_same(ordering.find_median(x, dim, keepdim), tuple(torch.median(x, dim, keepdim)))
    assert_same(ordering.find_kth(x, 1, dim, keepdim), tuple(torch.kthvalue(x, 1, dim, keepdim)))
    assert_same(ordering.find_median(x), torch.median(x))
    if x.dim():
        x[0] = torch.nan
    assert_same(ordering.find_median_without_nan(x, dim, keepdim)[0], torch.nanmedian(x, dim, keepdim)[0])
    assert_same(ordering.find_median(x, dim, keepdim)[0], torch.median(x, dim, keepdim)[0])
    assert_same(ordering.find_median_without_nan(x), torch.nanmedian(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_modes(dtype: torch.dtype) -> None:
    x = torch.tensor([[2, 1, 2, 1, 3], [5, 4, 5, 4, 4], [1, 2, 3, 4, 5]]).to(dtype)
    values, indices = ordering.find_mode(x, 1)
    assert_same(values, torch.mode(x, 1)[0])
    assert torch.equal(x.gather(1, indices[:, None])[:, 0], values)
    assert ordering.find_mode(x, 0, True)[0].shape == (1, 5)


@pytest.mark.parametrize("right", [False, True])
def test_searches(right: bool) -> None:
    rows, x = draw((3, 6)).sort(1)[0], draw((3, 4))
    x[0, 0] = rows[0, 2]
    assert_same(ordering.search_sorted(rows, x, right=right), torch.searchsorted(rows, x, right=right))
    side = "right" if right else "left"
    found = ordering.search_sorted(rows[0], x, side=side, out_int32=True)
    assert_same(found, torch.searchsorted(rows[0], x, side=side, out_int32=True))
    assert_same(ordering.search_sorted(rows[0], 0.3), torch.searchsorted(rows[0], 0.3))
    shuffled, order = rows.flip(1).contiguous(), rows.flip(1).argsort(1)
    assert_same(ordering.search_sorted(shuffled, x, sorter=order), torch.searchsorted(shuffled, x, sorter=order))


@pytest.mark.parametrize("invert", [False, True])
def test_membership(invert: bool) -> None:
    x, others = draw((3, 5), torch.int64), torch.tensor([[1, -2]])
    assert_same(ordering.is_in(x, others, invert=invert), torch.isin(x, others, invert=invert))
    assert_same(ordering.is_in(x, 1, invert=invert), torch.isin(x, 1, invert=invert))


P = torch.cat([torch.linspace(0, 1, 41), torch.tensor([1e-30, 1e-12, 1e-5, 1 - 1e-5])]).double()
X = torch.cat([torch.linspace(-8.3, 9, 200), torch.logspace(-3, 6, 50)]).double()
PAIRS = torch.tensor([3.0, -4.0, 0.0, -0.0, torch.inf, torch.nan, 1e200, -1e-200]).double()


@pytest.mark.parametrize(
    ("own", "torchs", "values"),
    [
        (functions.digamma, torch.digamma, (X,)),
        (functions.invert_erf, torch.erfinv, (2 * P - 1,)),
        (functions.invert_erf, torch.erfinv, (torch.tensor([-1e-9, 0.0, 1e-7, 2.0]).double(),)),
        (functions.invert_normal_distribution, torch.special.ndtri, (P,)),
        (
            functools.partial(functions.multivariate_log_gamma, p=3),
            functools.partial(torch.mvlgamma, p=3),
            (X.abs() + 2,),
        ),
        (functions.measure_hypotenuse, torch.hypot, (PAIRS[:, None], PAIRS)),
        (functions.copy_sign, torch.copysign, (PAIRS[:-3, None], PAIRS[:5])),
        (functions.choose_larger, torch.fmax, (PAIRS[:, None], PAIRS)),
        (functions.choose_smaller, torch.fmin, (PAIRS[:, None], PAIRS)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_of_values(own: Function, torchs: Function, values: tuple[Tensor, ...], dtype: torch.dtype) -> None:
    given = [value.to(dtype) for value in values]
    assert_same(own(*given), torchs(*given))


def test_randomized_leaks_in_eval_mode() -> None:
    x = draw((3, 5))
    assert_same(functions.leak_at_mean_rate(x, 0.1, 0.3), F.rrelu(x, 0.1, 0.3))
    assert functions.leak_at_mean_rate(x, training=True) is NotImplemented
    assert_same(functions.copy_sign(x, -0.0), torch.copysign(x, -0.0))


def test_distances_of_rows() -> None:
    x = draw((5, 3))
    for p in (1.0, 2.0, 3.0):
        assert_same(products.measure_own_distances(x, p), F.pdist(x, p))


INDEX = torch.tensor([[0, 0], [1, 1], [2, 3]])


@pytest.mark.parametrize("include_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_scattered_means(dtype: torch.dtype, include_self: bool) -> None:
    x, source = draw((3, 5), dtype), draw((3, 2), dtype)
    found = layouts.scatter_means(x, 1, INDEX, source, "mean", include_self=include_self)
    assert_same(found, x.scatter_reduce(1, INDEX, source, "mean", include_self=include_self))
    assert layouts.scatter_means(x, 1, INDEX, source, "sum") is NotImplemented


@pytest.mark.filterwarnings("ignore:index_reduce")
@pytest.mark.parametrize("reduce", ["mean", "prod", "amax", "amin"])
def test_rows_reduced_at_indices(reduce: str) -> None:
    x, index = draw((3, 5)), torch.tensor([0, 0, 2])
    for dim, source in ((0, draw((3, 5))), (1, draw((3, 3)))):
        assert_same(
            layouts.reduce_at_indices(x, dim, index, source, reduce), x.index_reduce(dim, index, source, reduce)
        )


@pytest.mark.parametrize("accumulate", [False, True])
def test_values_put_at_places(accumulate: bool) -> None:
    x, index = draw((3, 5)), torch.tensor([[0, -1], [7, 3]])
    source = draw((2, 2))
    assert_same(layouts.put_values(x, index, source, accumulate), x.put(index, source, accumulate))


@pytest.mark.parametrize("dim", [None, [0], [-1, 0]])
def test_shifts_of_zero(dim: list[int] | None) -> None:
    x = draw((5, 4, 3))
    assert_same(layouts.shift_zero_to_center(x, dim), torch.fft.fftshift(x, dim))
    assert_same(layouts.shift_zero_to_front(x, dim), torch.fft.ifftshift(x, dim))


def test_splits() -> None:
    x = draw((3, 7))
    assert_same(layouts.split_unevenly(x, 3, 1), list(x.split(3, 1)))
    assert layouts.split_unevenly(x, 7, 1) is NotImplemented


@pytest.mark.parametrize("periodic", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8])
def test_windows(length: int, periodic: bool) -> None:
    assert_same(layouts.make_hamming_window(length, periodic), torch.hamming_window(length, periodic))
    wanted = torch.hamming_window(length, periodic, 0.6, 0.3, dtype=torch.float64)
    assert_same(layouts.make_hamming_window(length, periodic, 0.6, 0.3, dtype=torch.float64), wanted)
    assert_same(layouts.make_bartlett_window(length, periodic), torch.bartlett_window(length, periodic))


REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


@pytest.mark.parametrize("reduction", list(REDUCTIONS))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(5,), (3, 5), (3, 5, 2)])
def test_cross_entropies(shape: tuple[int, ...], weighted: bool, reduction: str) -> None:
    x, weight = draw(shape), torch.arange(5.0) + 1 if weighted else None
    classes = 0 if x.dim() == 1 else 1
    labels = torch.randint(0, 5, [size for d, size in enumerate(shape) if d != classes])
    labels = torch.where(torch.rand(labels.shape) < 0.3, -100, labels) if labels.dim() else labels
    for target, smoothing in ((labels, 0.2), (x.softmax(classes), 0.0), (x.softmax(classes), 0.1)):
        found = layers.measure_cross_entropy(x, target, weight, REDUCTIONS[reduction], label_smoothing=smoothing)
        if reduction == "mean" and target.is_floating_point() and x.dim() == 1:
            continue  # one sample: PyTorch divides by a count of one as well
        assert_same(found, F.cross_entropy(x, target, weight, reduction=reduction, label_smoothing=smoothing))
    assert layers.measure_cross_entropy(x, labels) is NotImplemented


def test_pooling() -> None:
    x = draw((2, 3, 6, 7))
    found = layers.average_windows(x, [2, 3], [2, 2], [1, 1], divisor_override=5)
    assert_same(found, F.avg_pool2d(x, (2, 3), 2, 1, divisor_override=5))
    assert layers.average_windows(x, [2]) is NotImplemented
    assert_same(layers.choose_largest_in_windows(x, [4, 3]), F.adaptive_max_pool2d(x, (4, 3), return_indices=True))
    assert layers.choose_largest_in_windows(x, [3, 7]) is NotImplemented


class Cumulates(nn.Module):
    """In place, and as parts of other operators."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return (x * 1).cumprod_(1), torch.vander(x[0], 3), *x.chunk(3, 1)


def test_in_place_and_composite_operators_are_found() -> None:
    x = torch.rand(4, 7) + 0.5
    dims = {"x": {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}}
    program = torch.export.export(Cumulates(), (x,), dynamic_shapes=dims, strict=False)
    FoldConstantSizesPass()(program.graph_module)
    rewritten = program.run_decompositions(find_rules(program))
    names = {str(node.target).split(".")[1] for node in rewritten.graph.nodes if str(node.target).startswith("aten")}
    assert names & {"cumprod", "cumprod_", "vander", "chunk", "split"} == set()
    for size in ((4, 7), (5, 7)):
        other = torch.rand(size) + 0.5
        assert_same(rewritten.module()(other), Cumulates()(other))
