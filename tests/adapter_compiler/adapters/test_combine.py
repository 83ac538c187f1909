"""Weighted sums of adapters, against dense sums and against PEFT's own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.adapters.combine import compress_triplets
from adapter_compiler.errors import ConfigError

X = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(10, 12)
        self.raw = nn.Parameter(torch.randn(12, 9) / 4)
        self.down = nn.Linear(9, 8)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down((self.up(x).tanh() @ self.raw).tanh())
        return y


def adapt(model: nn.Module, *ranks: int, **options: Any) -> ac.AdaptedModel:
    """A model with one more adapter for each rank, with random values, called ``a``, ``b``, …."""
    adapted = ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(**{"rank": 1, **options}))
    for name, rank in zip("abc", ranks, strict=False):
        adapted.add_adapter(name, config=ac.AdapterConfig(rank=rank, alpha=1.5 * rank))
        with torch.no_grad():
            for parameter in adapted.parameters_of_adapter(name).parameters():
                parameter.normal_(0, 0.6)
    return adapted


def dense_updates(adapted: ac.AdaptedModel, name: str) -> dict[str, Tensor]:
    adapter_parameters = adapted.parameters_of_adapter(name)
    return {
        a.site.name: a.delta({k: p.detach().double() for k, p in adapter_parameters.parameters_of(a).items()})
        for a in adapted.adapter_set.plans[name]
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def model() -> Net:
    torch.manual_seed(0)
    return Net()


@settings(max_examples=8, deadline=None)
@given(
    weights=st.lists(st.floats(-2, 2), min_size=1, max_size=3),
    ranks=st.tuples(*[st.integers(1, 8)] * 3),
    seed=st.integers(0, 99),
)
def test_the_sum_is_the_dense_sum(weights: list[float], ranks: tuple[int, ...], seed: int) -> None:
    torch.manual_seed(seed)
    adapted = adapt(Net(), *ranks)
    names = "abc"[: len(weights)]
    adapted.combine(dict(zip(names, weights, strict=True)), name="sum")
    parts = [dense_updates(adapted, name) for name in names]
    for site, found in dense_updates(adapted, "sum").items():
        terms = [w * part[site] for w, part in zip(weights, parts, strict=True)]
        largest = max(float(term.norm()) for term in terms)
        assert float((found - torch.stack(terms).sum(0)).norm()) <= 1e-6 * max(largest, 1e-30)


def test_the_exact_sum_has_the_triplets_of_all_and_no_more_than_fit(model: Net) -> None:
    adapted = adapt(model, 2, 3, 7)
    with torch.no_grad():
        adapted.parameters_of_adapter("a").get_parameter("up.weight.lam")[0] = 0
    adapted.combine({"a": 1.0, "b": 1.0}, name="small")
    adapted.combine({"a": 1.0, "b": 1.0, "c": 1.0}, name="large")
    ranks = {name: [a.rank for a in adapted.adapter_set.plans[name]] for name in ("small", "large")}
    assert ranks == {"small": [5, 4, 5], "large": [9, 10, 8]}


@pytest.mark.parametrize("rank", [1, 3])
def test_a_lower_rank_gives_the_best_approximation(model: Net, rank: int) -> None:
    adapted = adapt(model, 3, 4)
    adapted.combine({"a": 0.7, "b": -0.3}, name="sum", rank=rank)
    a, b = dense_updates(adapted, "a"), dense_updates(adapted, "b")
    for site, found in dense_updates(adapted, "sum").items():
        U, S, Vh = torch.linalg.svd(0.7 * a[site] - 0.3 * b[site])
        best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
        assert relative(found, best) <= 1e-6
    assert {adapter.rank for adapter in adapted.adapter_set.plans["sum"]} == {rank}


def test_compressed_triplets_are_orthonormal_and_sorted() -> None:
    P, lam, Q = (torch.randn(shape, dtype=torch.float64) for shape in ((9, 5), (5,), (5, 7)))
    left, values, right = compress_triplets((P, lam, Q), 3)
    torch.testing.assert_close(left.t() @ left, torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(right @ right.t(), torch.eye(3, dtype=torch.float64))
    torch.testing.assert_close(values, torch.linalg.svdvals((P * lam) @ Q)[:3])


def test_a_sum_runs_trains_and_folds_like_any_adapter(model: Net) -> None:
    adapted = adapt(model, 2, 3)
    adapted.add_adapter("narrow", config=ac.AdapterConfig(rank=2, sites="down"))
    with torch.no_grad():
        for parameter in adapted.parameters_of_adapter("narrow").parameters():
            parameter.normal_()
    adapted.combine({"a": 0.5, "narrow": 2.0}, name="sum")
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, w in (("a", 0.5), ("narrow", 2.0)):
            for site, update in dense_updates(adapted, name).items():
                merged.get_parameter(site).add_((w * update).float())
    adapted.use("sum")
    torch.testing.assert_close(adapted(X), merged(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(adapted.fold()(X), merged(X), rtol=1e-5, atol=1e-5)
    adapted(X).square().sum().backward()
    assert all(p.grad is not None for p in adapted.trainable_parameters())


def test_half_precision(model: Net) -> None:
    adapted = adapt(model, 2, 3)
    adapted.to(torch.bfloat16)
    adapted.combine({"a": 1.0, "b": 1.0}, name="sum")
    assert {a.dtype for a in adapted.adapter_set.plans["sum"]} == {torch.bfloat16}
    a, b = dense_updates(adapted, "a"), dense_updates(adapted, "b")
    for site, found in dense_updates(adapted, "sum").items():
        assert relative(found, a[site] + b[site]) <= 2e-2


class TestAgainstPeft:
    """PEFT loads, adds and runs the same two LoRA adapters."""

    @pytest.fixture
    def peft_model(self, model: Net, tmp_path: Path) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(1)
        config = {"target_modules": ["up", "down"], "init_lora_weights": False}
        wrapped = peft.get_peft_model(
            copy.deepcopy(model), peft.LoraConfig(r=2, lora_alpha=3, **config), adapter_name="one"
        )
        wrapped.add_adapter("two", peft.LoraConfig(r=3, lora_alpha=2, **config))
        wrapped.save_pretrained(tmp_path)
        return wrapped

    @pytest.mark.parametrize(("kind", "rank"), [("cat", None), ("svd", 2)])
    def test_the_sum_computes_what_theirs_computes(
        self, model: Net, peft_model: Any, tmp_path: Path, kind: str, rank: int | None
    ) -> None:
        weights = {"one": 0.7, "two": 0.4}
        options = {} if rank is None else {"svd_rank": rank}
        peft_model.add_weighted_adapter(list(weights), list(weights.values()), "sum", combination_type=kind, **options)
        adapted = ac.compile_with_adapters(model, (X,), config=ac.AdapterConfig(rank=1))
        for name in weights:
            adapted.load_adapter(name, tmp_path / name)
        adapted.combine(weights, name="sum", rank=rank)
        for name in ("one", "two", "sum"):
            peft_model.set_adapter(name)
            adapted.use(name)
            torch.testing.assert_close(adapted(X), peft_model(X), rtol=1e-5, atol=1e-5)
        assert not torch.allclose(adapted(X), model(X), atol=1e-2)


def test_heads_that_differ_are_asked_about() -> None:
    torch.manual_seed(0)
    adapted = ac.compile_with_adapters(Net(), (X,), config=ac.AdapterConfig(rank=1, trainable="down"))
    adapted.add_adapter("b")
    adapted.combine({"default": 1, "b": 1}, name="same")
    with torch.no_grad():
        adapted.module.get_parameter("down.bias").add_(1)
    with pytest.raises(ConfigError, match=r"'default' and 'b' have different values of down\.bias"):
        adapted.combine({"default": 1, "b": 1}, name="sum")
    mine = adapted.module.get_parameter("down.bias").clone()
    adapted.combine({"default": 1, "b": 1}, name="sum", tensors_from="default")
    adapted.use("b")
    adapted.use("sum")
    assert torch.equal(adapted.module.get_parameter("down.bias"), mine)


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({}, {}, r"expected weights by adapter, as in \{'a': 0.7, 'b': 0.3\}"),
        (["a"], {}, "expected weights by adapter"),
        ({"none": 1.0}, {}, "there is no adapter 'none', expected one of 'default', 'a'"),
        ({"a": float("nan")}, {}, "the weight of 'a' is nan, expected a finite number"),
        ({"a": "1"}, {}, "the weight of 'a' is '1', expected a finite number"),
        ({"a": 1.0}, {"rank": 0}, r"combine\(rank=0\): expected an integer of at least 1"),
        ({"a": 1.0}, {"name": "a"}, "there is an adapter 'a' already"),
        ({"a": 1.0}, {"tensors_from": "none"}, "there is no adapter 'none'"),
    ],
)
def test_bad_sums_are_refused(model: Net, weights: Any, options: dict[str, Any], message: str) -> None:
    adapted = adapt(model, 2)
    with pytest.raises(ConfigError, match=message):
        adapted.combine(weights, **{"name": "sum", **options})
    assert adapted.adapter_names == ("default", "a")
