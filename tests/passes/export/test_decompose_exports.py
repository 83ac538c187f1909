from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from passes.export.decompose_exports import find_rules
from passes.export.decompositions.draws import draw_samples
from passes.export.decompositions.functions import log_gamma
from passes.export.decompositions.products import exponentiate_matrix, measure_distances, multiply_groups
from passes.export.decompositions.reductions import count_bins


@pytest.mark.parametrize("ends", [[2, 5, 7], [0, 7, 7], [3, 3, 5]])
def test_groups_equal_a_loop_over_them(ends: list[int]) -> None:
    torch.manual_seed(0)
    x, weight, offs = torch.randn(7, 4), torch.randn(3, 4, 5), torch.tensor(ends, dtype=torch.int32)
    expected = torch.zeros(7, 5)
    for group, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
        expected[begin:end] = x[begin:end] @ weight[group]
    torch.testing.assert_close(multiply_groups(x, weight, offs), expected)


@pytest.mark.parametrize(("bins", "low", "high"), [(5, 0, 4), (7, -1, 2), (4, 0, 0)])
def test_bins_equal_histc(bins: int, low: float, high: float) -> None:
    torch.manual_seed(0)
    x = torch.cat([torch.randn(200), torch.arange(6.0)])
    assert torch.equal(count_bins(x, bins, low, high), torch.histc(x, bins, low, high))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_gamma_equals_torchs(dtype: torch.dtype) -> None:
    x = torch.cat([torch.linspace(-7.9, 9, 500, dtype=dtype), torch.logspace(-3, 6, 100, dtype=dtype)])
    tolerance = 1e-5 if dtype is torch.float32 else 1e-9
    torch.testing.assert_close(log_gamma(x), torch.lgamma(x), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0, 3.5, float("inf")])
def test_distances_equal_cdist(p: float) -> None:
    a, b = torch.randn(2, 7, 4), torch.randn(5, 4)
    torch.testing.assert_close(measure_distances(a, b, p), torch.cdist(a, b.expand(2, 5, 4), p))


@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0])
def test_exponentials_of_matrices_equal_torchs(scale: float) -> None:
    x = scale * torch.randn(2, 6, 6, dtype=torch.float64)
    x[1] -= x[1].mT.clone()
    torch.testing.assert_close(exponentiate_matrix(x), torch.linalg.matrix_exp(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exponentiate_matrix(x.float()), torch.linalg.matrix_exp(x).float())


@pytest.mark.parametrize("replacement", [False, True])
def test_samples_are_drawn_by_their_weights(replacement: bool) -> None:
    p = torch.tensor([0.0, 1.0, 3.0, 4.0]).repeat(20_000, 1)
    drawn = draw_samples(p, 2, replacement)
    assert drawn.shape == (20_000, 2)
    assert replacement or bool((drawn[:, 0] != drawn[:, 1]).all())
    expected = torch.multinomial(p, 2, replacement)
    for column in range(2):
        shares, reference = (torch.bincount(d[:, column], minlength=4) / len(p) for d in (drawn, expected))
        torch.testing.assert_close(shares, reference, atol=0.02, rtol=0)


class Counts(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.lgamma(x).relu() + torch.histc(x, 3, 0.0, 3.0).sum()


def test_only_operators_without_a_translation_are_rewritten() -> None:
    x = torch.rand(5) + 1
    program = torch.export.export(Counts(), (x,), strict=False)
    rewritten = program.run_decompositions(find_rules(program))
    targets = {str(node.target) for node in rewritten.graph.nodes}
    assert not targets & {"aten.lgamma.default", "aten.histc.default"}
    assert "aten.relu.default" in targets
    torch.testing.assert_close(rewritten.module()(x), Counts()(x))
    assert find_rules(rewritten) == {}


class Scalars(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.abs().amax() - x.amin(1, keepdim=True) + torch.amin(x)


def test_extremes_over_all_dimensions() -> None:
    x = torch.randn(3, 5)
    program = torch.export.export(Scalars(), (x,), strict=False)
    rewritten = program.run_decompositions(find_rules(program))
    reductions = [
        node for node in rewritten.graph.nodes if str(node.target) in ("aten.amax.default", "aten.amin.default")
    ]
    assert [node.args[1:] for node in reductions] == [([1], True)]
    torch.testing.assert_close(rewritten.module()(x), Scalars()(x), rtol=0, atol=0)


def test_a_number_in_place_of_a_tensor_becomes_a_tensor() -> None:
    x = torch.randn(3)
    program = torch.export.export(nn.Sigmoid(), (x,), strict=False)
    node = program.graph.find_nodes(op="call_function", target=torch.ops.aten.sigmoid.default)[0]
    node.target, node.args = torch.ops.aten.sub.Tensor, (1.0, node.args[0])
    program.graph_module.recompile()
    rewritten = program.run_decompositions(find_rules(program))
    assert [str(node.target) for node in rewritten.graph.nodes if node.op == "call_function"] == [
        "aten.full.default",
        "aten.sub.Tensor",
    ]
    rewritten.graph_module.recompile()
    torch.testing.assert_close(rewritten.module()(x), 1.0 - x, rtol=0, atol=0)
