"""Python code reads values and shapes and branches on them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.soundness.common import EVAL, TRAIN, WIDTH, Run, Situation, draw_more, make, params
from tests.soundness.oracle import check


def item_in_a_branch(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return net.second(y) if y.mean().item() > -0.1 else y * 3


def false_answers_before_a_true_one(net: Any, x: Tensor) -> Any:
    for i in range(6):
        if x.mean().item() < 0.02 and i >= 1:
            break
        x = torch.tanh(net.first(x)) - 0.05
    return net.second(x)


def bool_of_a_tensor(net: Any, x: Tensor) -> Any:
    return net.first(x) if x.sum() > 0 else net.second(x)


def bool_of_any_and_all(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    if (y > 1.5).any():
        y = y.clamp(max=1.5)
    return net.second(y) if not (y > 0).all() else y


def int_as_a_loop_count(net: Any, x: Tensor) -> Any:
    for _ in range(1 + int(x.sum().abs().item()) % 4):
        x = torch.tanh(net.first(x))
    return x


def int_as_an_index(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return y[:, int(y.sum().abs().item()) % WIDTH]


def tensor_as_an_index(net: Any, x: Tensor) -> Any:
    layers = [net.first, net.second, net.inner]
    return layers[x.sum().abs().long() % 3](x)


def argmax_chooses_a_layer(net: Any, x: Tensor) -> Any:
    return net.inner[2 * (int(net.first(x).mean(0).argmax()) % 2)](x)


def float_as_a_factor(net: Any, x: Tensor) -> Any:
    return net.first(x) * float(x.std())


def float_by_math(net: Any, x: Tensor) -> Any:
    return net.first(x) * math.log1p(abs(net.second(x).sum().item()))


def tolist_of_rows(net: Any, x: Tensor) -> Any:
    order = sorted(range(len(x)), key=net.first(x).sum(1).tolist().__getitem__)
    return net.second(x[order])


def numpy_of_an_activation(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return net.second(y) + float(y.detach().numpy().max())


def numpy_of_a_weight(net: Any, x: Tensor) -> Any:
    return net.first(x) + float(net.second.weight.detach().numpy().sum())


def array_of_a_weight(net: Any, x: Tensor) -> Any:
    import numpy as np

    return net.first(x) * float(np.abs(np.asarray(net.second.weight.detach())).max())


def item_of_a_weight(net: Any, x: Tensor) -> Any:
    return net.first(x) if net.second.weight[0, 0].item() > 0 else net.second(x)


def branch_on_the_norm_of_a_weight(net: Any, x: Tensor) -> Any:
    return net.first(x) * (2 if net.first.weight.norm() > 2.7 else 1)


def str_of_a_value(net: Any, x: Tensor) -> Any:
    return net.first(x) * len(str(x.sum().item()))


def format_of_a_value(net: Any, x: Tensor) -> Any:
    return net.first(x) * (1 + f"{net.second(x).sum().item():.3f}".count("1"))


def repr_of_a_weight(net: Any, x: Tensor) -> Any:
    return net.first(x), "tensor" in repr(net.first.weight.detach()[0]), str(net.first.weight.detach()[:1].round())


def while_until_small(net: Any, x: Tensor) -> Any:
    steps = 0
    while x.norm() > 1 and steps < 9:
        x = net.first(x) * 0.4
        steps += 1
    return x, steps


def early_return(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    if bool((y.abs().max() > 3.0).item()):
        return y, "large"
    return net.second(y), "small"


def try_a_value(net: Any, x: Tensor) -> Any:
    try:
        if x.mean() < 0:
            raise ValueError
        y = net.first(x)
    except ValueError:
        y = net.second(x)
    return y


def try_a_shape(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    try:
        return y + torch.ones(3, 1)
    except RuntimeError:
        return y * 2


def raise_by_value(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    if y.max() > 2.6:
        raise OverflowError("too large")
    return y


def branch_on_the_batch(net: Any, x: Tensor) -> Any:
    return net.first(x) if len(x) > 4 else net.second(x) / x.shape[0]


def branch_on_the_number_of_dimensions(net: Any, x: Tensor) -> Any:
    return net.first(x).sum(1) if x.dim() == 3 else net.second(x)


def loop_over_rows(net: Any, x: Tensor) -> Any:
    rows = []
    for row in x:
        rows.append(net.first(row) if row[0] > 0 else net.second(row))
    return torch.stack(rows)


def nonzero_rows(net: Any, x: Tensor) -> Any:
    kept = (x[:, 0] > 0).nonzero().flatten()
    return net.first(x[kept]), len(kept)


def masked_rows(net: Any, x: Tensor) -> Any:
    out = torch.zeros_like(x)
    mask = x.sum(1) > 0
    out[mask] = net.first(x[mask])
    return out


def unique_values(net: Any, x: Tensor) -> Any:
    values = net.first(x).round().unique()
    return net.second(x) * len(values)


def routed_experts(net: Any, x: Tensor) -> Any:
    chosen = net.first(x).argmax(1) % 2
    out = torch.zeros_like(x)
    for expert in chosen.unique().tolist():
        rows = chosen == expert
        out[rows] = net.inner[2 * expert](x[rows])
    return out


def values_in_a_dictionary(net: Any, x: Tensor) -> Any:
    key = "up" if x.sum().sign().item() > 0 else "down"
    return {key: {"up": net.first, "down": net.second}[key](x)}


def assertion_on_a_value(net: Any, x: Tensor) -> Any:
    assert torch.isfinite(net.first.weight).all()
    assert x.abs().max() < 100
    return net.first(x)


def equality_of_tensors(net: Any, x: Tensor) -> Any:
    return net.first(x) if torch.equal(x[0], x[0].clamp(min=-1.2)) else net.second(x)


def allclose_of_weights(net: Any, x: Tensor) -> Any:
    return net.first(x) if torch.allclose(net.first.weight, net.second.weight) else net.second(x)


def comparison_chain(net: Any, x: Tensor) -> Any:
    value = net.first(x).sum().item()
    return net.second(x) * (1 if value < -2 else 2 if value < 0 else 3 if value < 2 else 4)


def max_of_python(net: Any, x: Tensor) -> Any:
    return net.first(max(list(x), key=lambda row: row.sum().item()))


def sampled_token(net: Any, x: Tensor) -> Any:
    chosen = torch.multinomial(torch.softmax(net.first(x), 1), 1).flatten()
    return net.second(x)[torch.arange(len(x)), chosen]


def random_permutation(net: Any, x: Tensor) -> Any:
    return net.first(x[torch.randperm(len(x))])


def coin(net: Any, x: Tensor) -> Any:
    for _ in range(4):
        x = torch.tanh(net.first(x) if torch.rand(()) < 0.5 else net.second(x))
    return x


def negative_zero(net: Any, x: Tensor, zero: Tensor) -> Any:
    return net.first(x) * math.copysign(1.0, zero.item())


def sign_bit(net: Any, x: Tensor, zero: Tensor) -> Any:
    return net.first(x) if torch.signbit(zero) else net.second(x)


def number_as_argument(net: Any, x: Tensor, number: Any) -> Any:
    y = net.first(x) * (number + 0.5) if number > 0.5 else net.second(x) - number
    return y * math.copysign(1.0, number)


def draw_rank_three() -> tuple[Any, ...]:
    return (torch.randn(2, 4, WIDTH),)


def draw_with(value: Any) -> Any:
    return lambda: (torch.randn(3, WIDTH), value)


class Adaptive(nn.Module):
    """Computes until a threshold is reached, like models of adaptive depth."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(4)])
        self.halt = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor) -> Any:
        depth = 0
        for layer in self.layers:
            depth += 1
            x = torch.tanh(layer(x))
            if torch.sigmoid(self.halt(x)).mean().item() > 0.52:
                break
        return x, depth


TABLE = [
    *(
        Situation(name=f.__name__.replace("_", "-"), build=make(f), later=draw_more)
        for f in (
            item_in_a_branch, false_answers_before_a_true_one, bool_of_a_tensor, bool_of_any_and_all,
            int_as_a_loop_count, int_as_an_index, tensor_as_an_index, argmax_chooses_a_layer, float_as_a_factor,
            float_by_math, tolist_of_rows, numpy_of_an_activation, numpy_of_a_weight, array_of_a_weight,
            item_of_a_weight, branch_on_the_norm_of_a_weight, str_of_a_value, format_of_a_value, repr_of_a_weight,
            while_until_small, early_return, try_a_value, try_a_shape, branch_on_the_batch,
            loop_over_rows, nonzero_rows, masked_rows, unique_values, routed_experts, values_in_a_dictionary,
            assertion_on_a_value, equality_of_tensors, allclose_of_weights, comparison_chain, max_of_python,
            sampled_token, random_permutation, coin,
        )
    ),
    Situation(
        name="branch-on-the-number-of-dimensions",
        build=make(branch_on_the_number_of_dimensions),
        later=draw_rank_three,
    ),
    Situation(name="raise-by-value", build=make(raise_by_value), later=draw_more, raises=True),
    Situation(name="adaptive-depth", build=Adaptive, later=draw_more),
    *(
        Situation(
            name=f"{f.__name__.replace('_', '-')}-as-argument",
            build=make(f),
            args=draw_with(torch.tensor(0.0)),
            later=draw_with(torch.tensor(-0.0)),
        )
        for f in (negative_zero, sign_bit)
    ),
    *(
        Situation(
            name=f"argument-{first!r}-then-{then!r}",
            build=make(number_as_argument),
            args=draw_with(first),
            later=draw_with(then),
        )
        for first, then in ((1, True), (1.0, 0.25), (2, 3), (True, 1.5), (0.0, -0.0))
    ),
]  # fmt: skip


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_values(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


#: Batches for which the branches above differ, so that a frozen branch would be noticed.
BATCHES = [
    [torch.randn(n, WIDTH, generator=torch.Generator().manual_seed(n)) * 1.5 + n / 10 - 0.4] for n in range(1, 6)
]


@pytest.mark.parametrize("run", [EVAL, TRAIN], ids=lambda run: run.name)
@pytest.mark.parametrize("function", [item_in_a_branch, false_answers_before_a_true_one, int_as_a_loop_count, coin])
def test_many_batches(function: Any, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for first, then in itertools.pairwise(BATCHES):
        one = Situation(name="batches", build=make(function), args=first.copy, later=then.copy)
        check(one, run, monkeypatch)
