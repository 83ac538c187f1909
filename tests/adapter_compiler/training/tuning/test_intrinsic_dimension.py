"""The intrinsic dimension of problems that have a known one, and a projection that is what it says."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.training.tuning.subspace import SubspaceModel, find_places, frozen


class Sums(nn.Module):
    """The toy of Li et al. (2018), section 2: 200 weights whose sums over groups of 20 must be 1, 2, …, 10."""

    def __init__(self, groups: int = 10) -> None:
        super().__init__()
        self.layer = nn.Linear(20, groups, bias=False)
        nn.init.zeros_(self.layer.weight)

    def forward(self) -> torch.Tensor:
        wanted = torch.arange(1, len(self.layer.weight) + 1, dtype=torch.float64)
        return ((self.layer.weight.sum(1) - wanted) / len(wanted)).square().sum()


def train(model: nn.Module) -> None:
    """To the optimum: the loss is quadratic."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.LBFGS(parameters, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12)

    def evaluate() -> torch.Tensor:
        optimizer.zero_grad()
        loss: torch.Tensor = model()
        loss.backward()
        return loss

    optimizer.step(evaluate)


@torch.no_grad()
def score(model: nn.Module) -> float:
    return -float(model())


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("groups", [3, 10, 13])
def test_a_problem_with_k_constraints_has_dimension_k(groups: int, seed: int) -> None:
    found = ac.measure_intrinsic_dimension(
        Sums(groups).double(), train, score, share=1 - 1e-7, full=0.0, tolerance=1.001, seed=seed
    )
    assert found.dimension == groups
    assert found.short == groups - 1
    assert found.weights == 20 * groups
    by_dimension = {point.dimension: point.score for point in found.points}
    assert by_dimension[groups - 1] < found.target <= by_dimension[groups]


def test_the_full_score_is_measured_and_the_model_does_not_change() -> None:
    model = Sums().double()
    before = model.layer.weight.detach().clone()
    found = ac.measure_intrinsic_dimension(model, train, score, seeds=2)
    assert found.full == pytest.approx(0, abs=1e-9)
    assert found.base == score(model)
    assert torch.equal(model.layer.weight, before)
    assert model.layer.weight.requires_grad
    assert 1 <= found.dimension <= 10
    assert found.dimension <= max(1.1 * found.short, found.short + 1)
    assert all(point.error is not None for point in found.points)
    assert f"intrinsic dimension {found.dimension}" in str(found)


def make_matrix(dimension: int, seed: int = 3) -> torch.Tensor:
    """P [D, d], column by column."""
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    names = [name for name, _ in model.named_parameters()]
    columns = []
    with frozen(model):
        inside = SubspaceModel(model, names, dimension, seed)
        for i in range(dimension):
            with torch.no_grad():
                inside.z.zero_()
                inside.z[i] = 1
            columns.append(torch.cat([weight.detach().flatten() for weight in inside.find_weights().values()]))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("dimension", [1, 4, 11])
def test_the_columns_are_orthonormal(dimension: int) -> None:
    P = make_matrix(dimension)
    torch.testing.assert_close(P.T @ P, torch.eye(dimension, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal((P != 0).sum(1), torch.ones(len(P), dtype=torch.long))
    assert not torch.equal(P, make_matrix(dimension, seed=4))
    assert torch.equal(P, make_matrix(dimension))


def test_hashes_are_even_and_do_not_depend_on_how_weights_are_split() -> None:
    device = torch.device("cpu")
    index, sign = find_places(0, 100_000, 50, 7, device)
    counts = torch.bincount(index, minlength=50).double()
    assert len(counts) == 50
    # χ² with 49 degrees of freedom: 49 ± 10; signs within five standard deviations.
    assert 10 < float(((counts - 2000) ** 2 / 2000).sum()) < 110
    assert abs(int(sign.sum())) < 5 * 100_000**0.5
    assert abs(float((sign[1:] * sign[:-1]).double().mean())) < 0.02
    parts = [find_places(start, 25_000, 50, 7, device) for start in range(0, 100_000, 25_000)]
    assert torch.equal(torch.cat([part[0] for part in parts]), index)
    assert torch.equal(torch.cat([part[1] for part in parts]), sign)
    assert not torch.equal(find_places(0, 100_000, 50, 8, device)[0], index)


def test_the_gradient_is_that_of_the_matrix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adapter_compiler.training.tuning.subspace._CHUNK", 4)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    x = torch.randn(6, 7, dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    with frozen(model):
        inside = SubspaceModel(model, names, 4, 3)
        torch.testing.assert_close(inside(x), model(x), rtol=0, atol=0)
        (gradient,) = torch.autograd.grad(inside(x).square().sum(), [inside.z])
    full = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    flat = torch.cat([part.flatten() for part in full])
    shapes = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    assert [p.shape for p in shapes.parameters()] == [p.shape for p in model.parameters()]
    torch.testing.assert_close(gradient, make_matrix(4).T @ flat, rtol=1e-10, atol=1e-10)


def test_only_the_chosen_weights_move() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)).double()
    with frozen(model):
        inside = SubspaceModel(model, ["1.weight"], 3, 0)
        assert [name for name, p in inside.named_parameters() if p.requires_grad] == ["z"]
        assert list(inside.find_weights()) == ["1.weight"]


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "share": ({"share": 0}, "(share=0): expected a number above 0 and at most 1"),
    "tolerance": ({"tolerance": 1}, "(tolerance=1): expected a number above 1"),
    "seeds": ({"seeds": 0}, "(seeds=0): expected an integer of at least 1"),
    "most": ({"most": 0}, "(most=0): expected an integer of at least 1, or None"),
    "weights": ({"weights": ("head*",)}, "no parameter matches, expected globs over names such as layer.weight"),
    "full": ({"full": -1e9}, "the full score is -1e+09 and that before training"),
    "too few": ({"most": 2, "share": 1 - 1e-7}, "no dimension up to 2 is enough; the last score is"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_options_that_cannot_work(name: str) -> None:
    options, text = FAILURES[name]
    with pytest.raises(ConfigError, match=re.escape(text)):
        ac.measure_intrinsic_dimension(Sums().double(), train, score, **options)
