"""Calls with other parameters, and gradients of the adapters: higher-order, per sample, and batched."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils.stateless import _reparametrize_module

import adapter_compiler as ac
from tests.soundness.common import IS_NIGHT, WIDTH, adapt, make, randomize, seed, treat_all_as_large
from tests.soundness.oracle import Oracle, assert_close

Tensors = dict[str, Tensor]

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's forward mode


def compute(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.first(x)))


def loop(net: Any, x: Tensor) -> Any:
    """One layer and one raw weight, several times in a row."""
    for _ in range(3):
        x = torch.tanh(net.first(x)) @ net.raw
    return F.linear(x, net.raw)


def by_row(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(F.linear(x, net.first.weight[2:6]))[..., [0, 1, 2, 3, 0, 1, 2, 3]])


MODELS: dict[str, Callable[..., Any]] = {"plain": compute, "loop": loop, "rows": by_row}


class Pair:
    """An adapted model, and plain functions of its parameters that must do the same."""

    def __init__(self, run: Callable[..., Any], kind: str = "svd") -> None:
        seed(1)
        model = make(run)().eval().double()
        self.x = torch.randn(4, WIDTH, dtype=torch.float64)
        self.adapted = adapt(model, (self.x,), kind=kind)
        self.oracle = Oracle(self.adapted, model)
        self.adapters = {n: p.detach() for n, p in self.adapted.adapters.named_parameters()}
        self.base = {n: p.detach() for n, p in model.named_parameters() if n in self.adapted.plan.by_weight}

    def call(self, adapters: Mapping[str, Tensor], x: Tensor) -> Any:
        """The adapted model with other adapters."""
        return functional_call(self.adapted, {f"adapters.{name}": p for name, p in adapters.items()}, (x,))

    def expect(self, adapters: Mapping[str, Tensor], x: Tensor, base: Mapping[str, Tensor] | None = None) -> Any:
        """The user's model with W + ΔW of these."""
        weights = {}
        for name, weight in (base or self.base).items():
            for planned in self.adapted.plan.by_weight[name]:
                own = {key: adapters[f"{name}.{key}"] for key in planned.parameter_shapes}
                weight = planned.rescale(weight + planned.delta(own), own)
            weights[name] = weight
        return functional_call(self.oracle.model, weights, (x,))

    def others(self, by: float = 0.5) -> Tensors:
        return {name: p * by + 0.1 for name, p in self.adapters.items()}


@pytest.fixture(params=["small", "large"], autouse=True)
def size(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "large":
        treat_all_as_large(monkeypatch)


@pytest.fixture(params=MODELS if IS_NIGHT else ["loop", "rows"])
def pair(request: pytest.FixtureRequest) -> Pair:
    return Pair(MODELS[request.param])


def check(pair: Pair, function: Callable[[Callable[..., Any]], Any]) -> None:
    """Compare both, where the adapters have an effect."""
    found, expected = function(pair.call), function(pair.expect)
    assert_close(found, expected, (1e-9, 1e-9))


def loss(call: Callable[..., Any], x: Tensor) -> Callable[[Tensors], Tensor]:
    return lambda adapters: call(adapters, x).square().sum()


def test_other_adapters(pair: Pair) -> None:
    check(pair, lambda call: call(pair.others(), pair.x))
    assert not torch.allclose(pair.call(pair.others(), pair.x), pair.adapted(pair.x))
    assert_close(pair.adapted(pair.x), pair.expect(pair.adapters, pair.x))


@pytest.mark.parametrize("on_module", [False, True])
def test_other_base_weights(pair: Pair, on_module: bool) -> None:
    base = {name: w * 0.5 + 0.1 for name, w in pair.base.items()}
    model = pair.adapted.module if on_module else pair.adapted
    named = base if on_module else {f"module.{name}": w for name, w in base.items()}
    assert_close(functional_call(model, named, (pair.x,)), pair.expect(pair.adapters, pair.x, base), (1e-9, 1e-9))
    assert_close(pair.adapted(pair.x), pair.expect(pair.adapters, pair.x), (1e-9, 1e-9))


def test_gradients_of_base_weights(pair: Pair) -> None:
    def run(base: Tensors) -> Any:
        return functional_call(pair.adapted.module, base, (pair.x,)).square().sum()

    expected = grad(lambda base: pair.expect(pair.adapters, pair.x, base).square().sum())(pair.base)
    assert_close(grad(run)(pair.base), expected, (1e-9, 1e-9))
    leaves = {name: w.clone().requires_grad_() for name, w in pair.base.items()}
    found = torch.autograd.grad(run(leaves), list(leaves.values()))
    assert_close(list(found), list(expected.values()), (1e-9, 1e-9))


def test_gradients(pair: Pair) -> None:
    check(pair, lambda call: grad(loss(call, pair.x))(pair.others()))


def test_gradients_are_those_of_autograd(pair: Pair) -> None:
    expected = grad(loss(pair.expect, pair.x))(pair.adapters)
    found = torch.autograd.grad(pair.adapted(pair.x).square().sum(), list(pair.adapted.adapters.parameters()))
    assert_close(list(found), list(expected.values()), (1e-9, 1e-9))


def test_gradients_with_create_graph(pair: Pair) -> None:
    """Also where one weight is used several times in a row, so that its input depends on it."""
    parameters = list(pair.adapted.adapters.parameters())
    value = pair.adapted(pair.x).square().sum()
    found = torch.autograd.grad(value, parameters, create_graph=True)
    expected = grad(loss(pair.expect, pair.x))(pair.adapters)
    assert_close([g.detach() for g in found], list(expected.values()), (1e-9, 1e-9))
    second = torch.autograd.grad(torch.stack([g.square().sum() for g in found]).sum(), parameters)

    def size_of_gradient(adapters: Tensors) -> Any:
        return sum(g.square().sum() for g in grad(loss(pair.expect, pair.x))(adapters).values())

    assert_close(list(second), list(grad(size_of_gradient)(pair.adapters).values()), (1e-9, 1e-9))


def test_a_step_inside_a_step(pair: Pair) -> None:
    """Meta-learning: the gradient through a step of the adapters."""

    def run(call: Callable[..., Any]) -> Any:
        leaves = {name: p.clone().requires_grad_() for name, p in pair.adapters.items()}
        inner = torch.autograd.grad(loss(call, pair.x)(leaves), list(leaves.values()), create_graph=True)
        moved = {name: p - 0.05 * g for (name, p), g in zip(leaves.items(), inner, strict=True)}
        return list(torch.autograd.grad(loss(call, pair.x * 0.5)(moved), list(leaves.values())))

    check(pair, run)


def test_gradients_by_sample(pair: Pair) -> None:
    def run(call: Callable[..., Any]) -> Any:
        by_sample = vmap(grad(lambda adapters, row: loss(call, row[None])(adapters)), in_dims=(None, 0))
        return by_sample(pair.adapters, pair.x)

    check(pair, run)


def test_an_ensemble_of_adapters(pair: Pair) -> None:
    stacked = {name: torch.stack([p, p * 0.5, p + 0.2]) for name, p in pair.adapters.items()}
    check(pair, lambda call: vmap(call, in_dims=(0, None))(stacked, pair.x))
    check(pair, lambda call: vmap(grad(loss(call, pair.x)))(stacked))


def test_products_with_derivatives(pair: Pair) -> None:
    tangents = {name: torch.cos(p) for name, p in pair.adapters.items()}
    check(pair, lambda call: jvp(lambda a: call(a, pair.x), (pair.adapters,), (tangents,)))
    check(pair, lambda call: jvp(grad(loss(call, pair.x)), (pair.adapters,), (tangents,))[1])
    check(pair, lambda call: vjp(lambda a: call(a, pair.x), pair.adapters)[1](torch.ones(4, WIDTH).double()))


def test_jacobians(pair: Pair) -> None:
    first = next(iter(pair.adapters))

    def of_one(call: Callable[..., Any]) -> Callable[[Tensor], Any]:
        return lambda p: call({**pair.adapters, first: p}, pair.x)

    check(pair, lambda call: jacrev(of_one(call))(pair.adapters[first]))
    check(pair, lambda call: jacfwd(of_one(call))(pair.adapters[first]))
    check(pair, lambda call: hessian(lambda p: of_one(call)(p).square().sum())(pair.adapters[first]))


def test_many_gradients_at_once(pair: Pair) -> None:
    expected = jacrev(lambda a: pair.expect(a, pair.x).sum(0))(pair.adapters)
    y = pair.adapted(pair.x).sum(0)
    parameters = list(pair.adapted.adapters.parameters())
    many = torch.eye(WIDTH, dtype=torch.float64)
    found = torch.autograd.grad(y, parameters, many, is_grads_batched=True)
    assert_close(list(found), list(expected.values()), (1e-9, 1e-9))


def test_parameters_replaced_for_a_while(pair: Pair) -> None:
    others = pair.others()
    with _reparametrize_module(pair.adapted, {f"adapters.{name}": p for name, p in others.items()}):
        assert_close(pair.adapted(pair.x), pair.expect(others, pair.x), (1e-9, 1e-9))
    assert_close(pair.adapted(pair.x), pair.expect(pair.adapters, pair.x), (1e-9, 1e-9))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_other_forms(kind: str) -> None:
    pair = Pair(loop, kind)
    check(pair, lambda call: call(pair.others(), pair.x))
    check(pair, lambda call: grad(loss(call, pair.x))(pair.others()))
    check(pair, lambda call: vmap(call, in_dims=(None, 0))(pair.adapters, pair.x[:, None]))
    parameters = list(pair.adapted.adapters.parameters())
    found = torch.autograd.grad(pair.adapted(pair.x).square().sum(), parameters, create_graph=True)
    expected = grad(loss(pair.expect, pair.x))(pair.adapters)
    assert_close([g.detach() for g in found], list(expected.values()), (1e-9, 1e-9))


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_numerical_derivatives(kind: str) -> None:
    """Compare with finite differences, which do not depend on any formula."""
    pair = Pair(loop, kind)
    names = list(pair.adapters)

    def call(x: Tensor, *adapters: Tensor) -> Any:
        return pair.call(dict(zip(names, adapters, strict=True)), x)

    inputs = [t.clone().requires_grad_() for t in (pair.x[:1], *pair.adapters.values())]
    assert torch.autograd.gradcheck(call, inputs, check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, check_batched_grad=True, fast_mode=True)


class Scopes(nn.Module):
    """Disables the adapters for a part of itself, like a model that contains its reference policy."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scope: Callable[[], Any] = contextlib.nullcontext

    def forward(self, x: Tensor) -> Any:
        with self.scope():
            reference = self.linear(x)
        return self.other(self.linear(x)), reference


def test_adapters_are_disabled_for_a_part() -> None:
    seed(1)
    model: Any = Scopes()
    x = torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    oracle = Oracle(adapted, model).model
    module: Any = adapted.module
    module.scope = lambda: adapted.disable_adapters()  # with a bound method, a fold would copy the whole adapted model
    found = adapted(x)
    assert_close(found, (oracle(x)[0], model(x)[1]))
    with adapted.disable_adapters():
        with adapted.disable_adapters():
            assert_close(adapted(x), model(x))
        assert_close(adapted(x), model(x))
        assert_close(module.linear.weight.detach(), model.linear.weight.detach())
        assert_close(adapted.fold()(x)[0], oracle(x)[0])
    assert_close(adapted(x)[0], oracle(x)[0])


def test_backward_after_the_scope_has_ended() -> None:
    pair = Pair(loop)
    with pair.adapted.disable_adapters():
        plain = pair.adapted(pair.x)
    assert not plain.requires_grad
    value = pair.adapted(pair.x).square().sum()
    with pair.adapted.disable_adapters():
        found = torch.autograd.grad(value, list(pair.adapted.adapters.parameters()))
    assert_close(list(found), list(grad(loss(pair.expect, pair.x))(pair.adapters).values()), (1e-9, 1e-9))


@pytest.mark.parametrize("checkpoint", [False, True])
def test_two_models_over_the_same_weights(checkpoint: bool) -> None:
    seed(1)
    model, x = make(loop)(), torch.randn(3, WIDTH)
    one = adapt(model, (x,), checkpoint=checkpoint)
    two = adapt(model, (x,), checkpoint=checkpoint)
    randomize(two, 0.9)
    expected = [Oracle(a, model).model(x) for a in (one, two)]
    assert_close([one(x), two(x)], expected)
    with one.disable_adapters():
        assert_close([one(x), two(x)], [model(x), expected[1]])
        y = two(x).square().sum()
    y.backward()
    assert all(p.grad is not None for p in two.adapters.parameters())
    assert isinstance(one, ac.AdaptedModel)
