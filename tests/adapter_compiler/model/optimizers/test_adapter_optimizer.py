"""The optimizers against plain loops, and what a torch optimizer must do: closures, groups, schedulers, refusals."""

from __future__ import annotations

import copy
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, NonFiniteGradientError
from tests.adapter_compiler.training.helpers import assert_same, make_adapted, set_gradients

#: Options that differ from each other and from the defaults.
OPTIONS: dict[str, Any] = {"other_lr": 0.03, "momentum": 0.7, "betas": (0.6, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def make(kind: str = "svd", **options: Any) -> ac.AdaptedModel:
    """Layers of different shapes, two of one shape, and trained biases."""
    torch.manual_seed(0)
    shapes = ((6, 9), (9, 9), (9, 9), (9, 4))
    model = nn.ModuleList([nn.Linear(fan_in, out) for fan_in, out in shapes]).double()
    config = ac.AdapterConfig(kind=kind, rank=3, trainable=("*.bias",), **options)
    adapted = ac.compile_with_adapters(model, config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
    return adapted


def find_direction(rule: str, name: str, n: Tensor) -> Tensor:
    """The update of one factor at lr = 1, written out."""
    if rule == "muon":
        U, _, V = torch.linalg.svd(n, full_matrices=False)
        polar: Tensor = U @ V
        return polar * math.sqrt(max(n.shape))
    dim = 1 if name in "PB" else 0
    return torch.stack([v / v.square().mean().sqrt() for v in n.unbind(dim)], dim=dim)


class Reference:
    """Plain loops over single parameters; AdamW is torch's."""

    def __init__(self, adapted: ac.AdaptedModel, rule: str, lr: float, options: dict[str, Any]) -> None:
        self.rule, self.lr, self.options = rule, lr, options
        keyed = adapted.adapters.keyed_parameters
        self.factors = {key: p for key, p in keyed.items() if key[1] in ("P", "Q", "A", "B")}
        self.moments = {key: torch.zeros_like(p) for key, p in self.factors.items()}
        factors = {id(p) for p in self.factors.values()}
        others = [p for p in adapted.trainable_parameters() if id(p) not in factors]
        self.adamw = torch.optim.AdamW(
            others, lr=options["other_lr"], betas=options["betas"], eps=options["eps"], weight_decay=0.0
        )

    @torch.no_grad()
    def step(self) -> None:
        self.adamw.step()
        mu, decay = self.options["momentum"], self.options["weight_decay"]
        for key, X in self.factors.items():
            if X.grad is None:
                continue
            m = self.moments[key] = mu * self.moments[key] + (1 - mu) * X.grad
            n = (1 - mu) * X.grad + mu * m
            X.copy_((1 - self.lr * decay) * X - self.lr * find_direction(self.rule, key[1], n))


@pytest.mark.parametrize("flat", [True, False])
@pytest.mark.parametrize("rule", ["muon", "triplet"])
@pytest.mark.parametrize("kind", ["svd", "lora", "dora", "dora-svd"])
def test_is_the_plain_loop(kind: str, rule: str, flat: bool) -> None:
    adapted = make(kind)
    other = copy.deepcopy(adapted)
    if not flat:
        for parameter in adapted.adapters.parameters():
            parameter.data = parameter.data.clone()
    assert (adapted.adapters.flat is not None) == flat
    optimizer, reference = ac.make_optimizer(adapted, 0.02, rule=rule, **OPTIONS), Reference(other, rule, 0.02, OPTIONS)
    for step in range(6):
        set_gradients(adapted)
        for mine, its in zip(adapted.trainable_parameters(), other.trainable_parameters(), strict=True):
            if step == 2 and mine.dim() == 2 and mine.shape[0] == 9:
                mine.grad = None  # a layer that the batch did not use
            its.grad = None if mine.grad is None else mine.grad.clone()
        optimizer.step()
        reference.step()
    for mine, its in zip(adapted.trainable_parameters(), other.trainable_parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-10, atol=1e-10)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4),
    role=st.sampled_from(["left", "right"]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    optimizer_class=st.sampled_from([ac.AdapterMuon, ac.AdapterNormalized]),
)
def test_every_shape_and_dtype_moves_by_the_rate(
    shapes: list[tuple[int, int]], role: str, dtype: torch.dtype, optimizer_class: type[ac.AdapterMuon]
) -> None:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in shapes]
    optimizer = optimizer_class([{"params": parameters, "role": role}], 0.5)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape).to(dtype)
    optimizer.step()
    for parameter in parameters:
        length = 0.5 * math.sqrt(parameter.numel())
        assert float(parameter.detach().double().norm()) == pytest.approx(length, rel=0.05)
        assert optimizer.state[parameter]["momentum_buffer"].dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize("optimizer_class", [ac.AdapterMuon, ac.AdapterNormalized])
@pytest.mark.parametrize("role", ["left", "right"])
def test_a_triplet_without_gradient_does_not_move_and_does_not_change_the_others(
    role: str, optimizer_class: type[ac.AdapterMuon]
) -> None:
    """From the third step on, the middle triplet has no gradient, though its momentum is not zero yet."""
    dim, kept = (1 if role == "left" else 0), torch.tensor([0, 2])
    torch.manual_seed(0)
    whole = nn.Parameter(torch.randn((7, 3) if role == "left" else (3, 7), dtype=torch.float64))
    optimizer = optimizer_class([{"params": [whole], "role": role}], 0.1)
    for step in range(5):
        if step == 2:
            before = whole.detach().clone()
            part = nn.Parameter(before.index_select(dim, kept))
            other = optimizer_class([{"params": [part], "role": role}], 0.1)
            other.state[part]["momentum_buffer"] = optimizer.state[whole]["momentum_buffer"].index_select(dim, kept)
        whole.grad = torch.randn_like(whole)
        if step >= 2:
            whole.grad.select(dim, 1).zero_()
            part.grad = whole.grad.index_select(dim, kept)
            other.step()
        optimizer.step()
    assert torch.equal(whole.select(dim, 1), before.select(dim, 1))
    torch.testing.assert_close(whole.index_select(dim, kept), part, rtol=0, atol=1e-12)


def test_groups() -> None:
    adapted = make("dora-svd")
    optimizer = ac.make_optimizer(adapted, 0.02, other_lr=0.01, weight_decay=0.3)
    sites = len(adapted.sites)
    found = [(g["role"], len(g["params"]), g["lr"], g["weight_decay"]) for g in optimizer.param_groups]
    assert found == [("left", sites, 0.02, 0.3), ("right", sites, 0.02, 0.3), ("other", 3 * sites, 0.01, 0.0)]
    assert isinstance(optimizer, ac.AdapterMuon)
    assert isinstance(ac.make_optimizer(adapted, 0.02, rule="triplet"), ac.AdapterNormalized)
    wrapper = nn.Module()
    wrapper.module = adapted  # as DistributedDataParallel holds it
    assert len(ac.make_optimizer(wrapper, 0.02).param_groups) == len(found)


def test_a_trained_matrix_is_updated_by_adamw_with_weight_decay() -> None:
    model = nn.ModuleDict({"head": nn.Linear(4, 4), "body": nn.Linear(4, 4)})
    adapted = ac.compile_with_adapters(
        model, config=ac.AdapterConfig(rank=2, sites=("body.weight",), trainable=("head.weight",))
    )
    optimizer = ac.make_optimizer(adapted, 0.02, weight_decay=0.1)
    roles = {id(p): (g["role"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert roles[id(adapted.base_weight("head.weight"))] == ("other", 0.1)


def test_closure() -> None:
    one, other = make(), make()
    losses = []
    for adapted, with_closure in ((one, True), (other, False)):
        optimizer = ac.make_optimizer(adapted, 0.02)

        def closure(adapted: ac.AdaptedModel = adapted, optimizer: torch.optim.Optimizer = optimizer) -> Any:
            optimizer.zero_grad()
            loss = torch.stack([p.square().sum() for p in adapted.trainable_parameters()]).sum()
            loss.backward()
            return loss.detach()

        if with_closure:
            losses.append(optimizer.step(closure))
        else:
            losses.append(closure())
            assert optimizer.step() is None
    assert losses[0] is not None and losses[0] == losses[1]
    assert_same(one.state_dict(), other.state_dict())


def test_schedulers_set_the_rate_of_each_group() -> None:
    adapted = make()
    optimizer = ac.make_optimizer(adapted, 0.02, other_lr=0.01)
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, total_steps=10, cycle_momentum=False)
    set_gradients(adapted)
    optimizer.step()
    scheduler.step()
    now = [group["lr"] for group in optimizer.param_groups]
    assert now[0] == now[1] == pytest.approx(2 * now[2]) and 0 < now[0] < 0.02


def test_copies_and_pickles_go_on() -> None:
    adapted = make()
    optimizer = ac.make_optimizer(adapted, 0.02)
    set_gradients(adapted)
    optimizer.step()
    copied, expected = copy.deepcopy(optimizer), adapted.trainable_parameters()
    parameters = [p for group in copied.param_groups for p in group["params"]]
    for parameter, its in zip(parameters, [p for g in optimizer.param_groups for p in g["params"]], strict=True):
        parameter.grad = its.grad.clone()
    optimizer.step()
    copied.step()
    assert len(parameters) == len(expected)
    assert_same(copied.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("index", [0, -1])
def test_gradients_that_are_not_finite_change_nothing(value: float, index: int) -> None:
    adapted = make()
    optimizer = ac.make_optimizer(adapted, 0.02, weight_decay=0.1)
    set_gradients(adapted)
    gradient = adapted.trainable_parameters()[index].grad
    assert gradient is not None
    gradient.view(-1)[-1] = value
    before = copy.deepcopy([adapted.state_dict(), optimizer.state_dict()])
    name = "0.weight.P" if index == 0 else "3.bias"
    text = f"the gradients of 1 of 16 parameters have inf or nan (first: {name}), expected finite numbers"
    with pytest.raises(NonFiniteGradientError, match=re.escape(text)):
        optimizer.step()
    assert_same([adapted.state_dict(), optimizer.state_dict()], before)


def test_gradients_whose_sum_overflows_are_used() -> None:
    parameter = nn.Parameter(torch.zeros(4, 2))
    optimizer = ac.AdapterMuon([{"params": parameter, "role": "left"}], 0.1)
    parameter.grad = torch.full_like(parameter, 3e38)
    parameter.grad[:2, 1] *= -1
    optimizer.step()
    assert float(parameter.detach().square().sum()) == pytest.approx(0.1**2 * 4 * 2, rel=1e-4)


def test_sparse_gradients_are_refused() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(5, 4, sparse=True), "body": nn.Linear(4, 4)})
    adapted = ac.compile_with_adapters(
        model, config=ac.AdapterConfig(rank=2, sites=("body.weight",), trainable=("table.weight",))
    )
    optimizer = ac.make_optimizer(adapted, 0.02)
    nn.functional.embedding(torch.tensor([1]), adapted.base_weight("table.weight"), sparse=True).sum().backward()
    with pytest.raises(ConfigError, match=r"gradient of table\.weight is sparse, expected a dense real one"):
        optimizer.step()


def test_complex_gradients_are_refused() -> None:
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = ac.AdapterMuon([{"params": parameter, "role": "other"}], 0.1)
    parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ConfigError, match=r"gradient of a parameter of shape \(3,\) is complex"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"lr": -1.0}, "AdapterMuon(lr=-1.0): expected a finite number of at least 0"),
        ({"lr": math.nan}, "AdapterMuon(lr=nan): expected a finite number of at least 0"),
        ({"other_lr": -1.0}, "AdapterMuon(lr=-1.0): expected a finite number of at least 0"),
        ({"eps": math.inf}, "AdapterMuon(eps=inf): expected a finite number of at least 0"),
        ({"weight_decay": -0.1}, "AdapterMuon(weight_decay=-0.1): expected a finite number of at least 0"),
        ({"momentum": 1.0}, "AdapterMuon(momentum=1.0): expected a number of at least 0 and less than 1"),
        ({"betas": (0.9, 1.0)}, "AdapterMuon(betas=(0.9, 1.0)): expected two numbers of at least 0 and less than 1"),
        ({"betas": (0.9,)}, "AdapterMuon(betas=(0.9,)): expected two numbers of at least 0 and less than 1"),
        ({"rule": "sgd"}, "make_optimizer(rule='sgd'): expected one of 'muon', 'triplet'"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(text)):
        ac.make_optimizer(make(), **{"lr": 0.1} | options)


def test_parameters_without_a_role_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"role=None, expected 'left' \(P, B\), 'right' \(Q, A\) or 'other'"):
        ac.AdapterMuon(make().trainable_parameters(), 0.1)
    with pytest.raises(ConfigError, match=r"shape \(3,\) has role='left', expected a matrix"):
        ac.AdapterMuon([{"params": [nn.Parameter(torch.zeros(3))], "role": "left"}], 0.1)


def test_other_models_are_refused() -> None:
    with pytest.raises(ConfigError, match="make_optimizer got a Linear, expected the result of compile_with_adapters"):
        ac.make_optimizer(nn.Linear(2, 2), 0.1)
    adapted = make_adapted()
    for parameter in adapted.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="the adapted model has no trainable parameters"):
        ac.make_optimizer(adapted, 0.1)
