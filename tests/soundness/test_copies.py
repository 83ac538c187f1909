"""Copies, files, folds and renamed modules: the result must compute the same as the model."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from tests.soundness.common import WIDTH, Net, adapt, make, randomize, seed
from tests.soundness.oracle import Oracle, assert_close


class Parts(nn.Module):
    """A model with every kind of module with weights that is difficult to copy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, WIDTH)
        self.linear, self.norm, self.drop = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Dropout(0.3)
        self.lstm = nn.LSTM(WIDTH, WIDTH, batch_first=True)
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.head = nn.Linear(WIDTH, 6, bias=False)
        self.head.weight = self.embed.weight
        self.aside = [self.linear]
        self.scale = 1.0

    def forward(self, x: Tensor) -> Any:
        y = self.drop(self.norm(self.linear(self.embed(x)) + self.aside[0](self.embed(x) * 2)))
        y = self.lstm(y)[0] + self.attend(y, y, y)[0]
        return self.head(self.conv(y.mT).mT @ self.raw) * self.scale


def tokens() -> Tensor:
    return torch.tensor([[1, 2, 3], [5, 0, 4]])


def by_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def by_torch(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "deepcopy-of-deepcopy": lambda value: copy.deepcopy(copy.deepcopy(value)),
    "pickle": by_pickle,
    "torch-save": by_torch,
    "pickle-of-deepcopy": lambda value: by_pickle(copy.deepcopy(value)),
}


def prepare(**options: Any) -> tuple[ac.AdaptedModel, nn.Module]:
    seed(1)
    model = Parts().eval()
    adapted = adapt(model, (tokens(),), capture="off", **options)
    return adapted, Oracle(adapted, model).model


@pytest.mark.parametrize("options", [{}, {"kind": "dora"}, {"checkpoint": True}], ids=["svd", "dora", "checkpoint"])
@pytest.mark.parametrize("way", COPIES)
def test_a_copy_is_another_model_that_does_the_same(way: str, options: dict[str, Any]) -> None:
    adapted, oracle = prepare(**options)
    expected = oracle(tokens())
    copied = COPIES[way](adapted)
    assert_close(copied(tokens()), expected)
    randomize(copied, 1.0)
    copied.module.scale = 2.0
    assert_close(adapted(tokens()), expected)
    assert_close(copied.fold()(tokens()), copied(tokens()).detach(), (1e-4, 1e-4))
    copied(tokens()).sum().backward()
    assert all(p.grad is None for p in adapted.adapters.parameters())
    assert all(p.grad is not None for p in copied.adapters.parameters())


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_the_module_does_the_same(way: str) -> None:
    adapted, oracle = prepare()
    expected = oracle(tokens())
    copied = COPIES[way](adapted.module)
    assert_close(copied(tokens()).detach(), expected.detach())
    randomize(adapted, 1.0)  # must not affect the copy
    assert_close(copied(tokens()).detach(), expected.detach())
    assert copied.linear.weight.detach().norm() > 0


def test_a_copy_of_a_submodule_does_the_same() -> None:
    adapted, oracle = prepare()
    x = torch.randn(3, WIDTH)
    expected: Any = oracle.get_submodule("linear")(x)
    linear = adapted.module.get_submodule("linear")
    assert_close(copy.deepcopy(linear)(x), expected)
    assert_close(by_pickle(linear)(x), expected)


def test_a_copy_of_a_weight_is_its_values() -> None:
    adapted, oracle = prepare()
    weight: Any = oracle.get_parameter("linear.weight")
    read: Any = adapted.module.get_submodule("linear").weight
    for copied in (copy.deepcopy(read), copy.copy(read), by_torch(read)):
        assert_close(copied.detach() + 0, weight.detach())


def test_a_fold_is_the_users_class_with_the_users_keys() -> None:
    adapted, oracle = prepare()
    folded: Any = adapted.fold()
    assert type(folded) is Parts
    assert all(type(child).__module__.startswith(("torch.nn", __name__)) for child in folded.modules())
    assert [type(c) for c in folded.modules()] == [type(c) for c in oracle.modules()]
    assert_close(folded.state_dict(), oracle.state_dict())
    assert folded.head.weight is folded.embed.weight
    assert folded.aside[0] is folded.linear
    assert_close(folded(tokens()).detach(), oracle(tokens()).detach())


def test_the_module_keeps_its_keys_and_plain_weights() -> None:
    seed(1)
    model = Parts().eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    adapted = adapt(model, (tokens(),))
    adapted(tokens())
    for found in (adapted.module.state_dict(), dict(adapted.module.named_parameters(remove_duplicate=False))):
        assert list(found) == list(before)
        assert_close({key: value.detach() for key, value in found.items()}, before)
    assert all(type(value) in (Tensor, nn.Parameter) for value in adapted.state_dict().values())
    assert_close(dict(model.state_dict()), before)
    assert type(model.linear) is nn.Linear


def test_a_state_dict_goes_back_and_forth() -> None:
    adapted, oracle = prepare()
    saved = by_torch(adapted.state_dict())
    other = adapt(Parts().eval(), (tokens(),), capture="off")  # the same plan
    other.load_state_dict(saved)
    assert_close(other(tokens()), oracle(tokens()))
    other.load_state_dict(adapted.state_dict(), assign=True)
    assert_close(other(tokens()), oracle(tokens()))


@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to(torch.float64), lambda m: m.module.double()])
def test_another_dtype(move: Callable[[Any], Any]) -> None:
    adapted, oracle = prepare(dtype=torch.float64)
    move(adapted)
    assert_close(adapted(tokens()).double(), oracle.double()(tokens()), (1e-4, 1e-5))


def test_share_memory_and_zero_grad() -> None:
    adapted, oracle = prepare()
    adapted.share_memory()
    adapted(tokens()).sum().backward()
    adapted.module.zero_grad()
    adapted.zero_grad()
    assert_close(adapted(tokens()), oracle(tokens()))


def test_a_model_adapted_in_place() -> None:
    """A function that the user's model closes over sees the model itself."""
    seed(1)
    model: Any = Net(lambda net, x: net.outside(x))
    model.outside = lambda x: model.second(torch.tanh(model.first(x)))
    x, names = torch.randn(3, WIDTH), ("first.weight", "second.weight")
    base = {name: model.get_parameter(name).detach().clone() for name in names}
    adapted = adapt(model, (x,), inplace=True)
    oracle = make(lambda net, x: net.second(torch.tanh(net.first(x))))()
    oracle.load_state_dict(adapted.module.state_dict())
    for name, weight in base.items():
        (planned,) = adapted.plan.by_weight[name]
        delta = planned.delta(adapted.adapters.parameters_of(planned))
        oracle.get_parameter(name).data = (weight + delta).detach()
    assert_close(adapted(x).detach(), oracle(x).detach())
    assert_close(model(x).detach(), oracle(x).detach())
    assert not torch.allclose(oracle(x), x)


def test_folding_a_fold_and_adapting_it_again() -> None:
    adapted, oracle = prepare()
    again = adapt(adapted.fold(), (tokens(),))
    expected = Oracle(again, oracle).model
    assert_close(again(tokens()), expected(tokens()))
    assert_close(again.fold()(tokens()).detach(), expected(tokens()).detach())


def test_named_adapters_are_switched() -> None:
    seed(1)
    model = Parts().eval()
    adapted = adapt(model, (tokens(),))
    first = Oracle(adapted, model).model(tokens())
    adapted.add_adapter("other")
    adapted.use("other")
    randomize(adapted, 0.9)
    second = Oracle(adapted, model).model(tokens())
    assert_close(adapted(tokens()), second)
    assert_close(adapted.module(tokens()), second)
    assert_close(copy.deepcopy(adapted)(tokens()), second)
    adapted.use("default")
    assert_close(adapted(tokens()), first)
    assert not torch.allclose(first, second)
