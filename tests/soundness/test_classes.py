"""Users' classes and containers of unusual kinds."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.soundness.common import EVAL, LARGE, WATCHED, WIDTH, Run, Situation, adapt, params, seed
from tests.soundness.oracle import Oracle, assert_close, check

T = TypeVar("T")


class Typed(nn.Linear, Generic[T]):
    pass


class Abstract(nn.Linear, abc.ABC):
    @property
    def doubled(self) -> Tensor:
        return self.weight * 2

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.doubled)


class Tagged(nn.Linear):
    """A class whose subclasses must give an argument."""

    def __init_subclass__(cls, *, tag: str) -> None:
        cls.tag = tag  # type: ignore[attr-defined]


class Tag(Tagged, tag="a"):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * len(type(self).tag)  # type: ignore[attr-defined]


class GivesAttributes(nn.Linear):
    def __getattr__(self, name: str) -> Any:
        return 3.0 if name == "extra" else super().__getattr__(name)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.extra


class GivesAllAttributes(nn.Linear):
    def __getattribute__(self, name: str) -> Any:
        return 2.0 if name == "extra" else super().__getattribute__(name)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * self.extra


class SetsAttributes(nn.Linear):
    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)

    def forward(self, x: Tensor) -> Any:
        self.last = x.detach().sum()
        return super().forward(x) * self.last


class Calls(nn.Linear):
    def __call__(self, x: Tensor) -> Any:
        return super().__call__(x) * 2


class Slots(nn.Linear):
    __slots__ = ("seen",)

    def forward(self, x: Tensor) -> Any:
        self.seen = len(x)
        return super().forward(x) * self.seen


class ComputesWeight(nn.Module):
    def __init__(self, *_: int) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH))

    @property
    def weight(self) -> Tensor:
        return self.raw.tril()

    def forward(self, x: Tensor) -> Any:
        return F.linear(x, self.weight)


class KnowsItsClass(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (2 if type(self).__name__ == "KnowsItsClass" else 1)


class AsksForItsClass(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * (2 if self.__class__ is AsksForItsClass else 1)


class CallsBase(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super(CallsBase, self).forward(x) + nn.Linear.forward(self, x)  # noqa: UP008


class WithoutGradient(nn.Linear):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Any:
        return super().forward(x)


class StaticFunction(nn.Linear):
    function = staticmethod(F.linear)

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight, self.bias)


class InPlace(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return torch.mm(input, self.weight.t()).add_(self.bias).relu_()


class OtherSignature(nn.Linear):
    def forward(self, x: Tensor, *, scale: float = 2.0) -> Any:
        return super().forward(x) * scale


class Transposed(nn.Module):
    """Stores its weight as [in, out], like Conv1D of transformers."""

    def __init__(self, *_: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), nn.Parameter(torch.randn(WIDTH))

    def forward(self, x: Tensor) -> Any:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(x.shape)


CLASSES: list[Callable[..., nn.Module]] = [
    Typed, Abstract, Tag, GivesAttributes, GivesAllAttributes, SetsAttributes, Calls, Slots, ComputesWeight,
    KnowsItsClass, AsksForItsClass, CallsBase, WithoutGradient, StaticFunction, InPlace, OtherSignature, Transposed,
]  # fmt: skip


class Around(nn.Module):
    def __init__(self, layer: nn.Module, call: Callable[..., Any] = lambda layer, x: layer(x)) -> None:
        super().__init__()
        self.before, self.layer, self.call = nn.Linear(WIDTH, WIDTH), layer, call

    def forward(self, x: Tensor) -> Any:
        return self.call(self.layer, self.before(x))


class SelfAttention(nn.MultiheadAttention):
    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        return super().forward(x, x, x, need_weights=False)[0]


class OwnAttention(nn.MultiheadAttention):
    """Reads the weights of its base class in its own way."""

    def forward(self, x: Tensor) -> Any:  # type: ignore[override]
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return self.out_proj(F.scaled_dot_product_attention(q, k, v))


class AttentionByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.out = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) / 3), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        x = x[:, None]
        return F.multi_head_attention_forward(
            x, x, x, WIDTH, 2, self.weight, None, None, None, False, 0.0, self.out.weight, self.out.bias,
            training=self.training,
        )[0]  # fmt: skip


def run_by_all_weights(layer: Any, x: Tensor) -> Any:
    return layer(x)[0] + sum(weight.sum() for weights in layer.all_weights for weight in weights)


def run_flattened(layer: Any, x: Tensor) -> Any:
    layer.flatten_parameters()
    return layer(x)[0]


def run_in_cpp(layer: Any, x: Tensor) -> Any:
    state = (torch.zeros(1, 1, WIDTH), torch.zeros(1, 1, WIDTH))
    return torch._VF.lstm(x[None], state, layer._flat_weights, True, 1, 0.0, False, False, True)[0]


def run_alternative(layer: Any, x: Tensor) -> Any:
    """Compute the first step by hand, with the weights of the layer."""
    gates = F.linear(x, layer.weight_ih_l0, layer.bias_ih_l0) + F.linear(x, layer.weight_hh_l0, layer.bias_hh_l0)
    return layer(x)[0] + torch.tanh(gates).sum()


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dict = nn.ParameterDict({key: torch.randn(WIDTH, WIDTH) / 3 for key in "abc"})
        self.list = nn.ParameterList([torch.randn(WIDTH, WIDTH) / 3 for _ in range(12)])

    def forward(self, x: Tensor) -> Any:
        for weight in self.dict.values():
            x = x @ weight
        for _, weight in self.dict.items():
            x = torch.tanh(x @ weight)
        for key in self.dict:
            x = x + x @ self.dict[key]
        x = x @ sum(list(self.list)) + torch.stack(tuple(self.list)).sum()
        return x @ self.list[-1] + x @ self.dict.get("a") * len(self.list)


class Slices(Lists):
    def forward(self, x: Tensor) -> Any:
        for weight in self.list[1:4]:
            x = torch.tanh(x @ weight)
        return x @ self.dict["a"] + x @ self.list[0]


class Items(Lists):
    def forward(self, x: Tensor) -> Any:
        return torch.tanh(x @ self.dict["a"]) @ self.list[0]


def replace_in_a_dict(model: Any) -> None:
    model.dict.pop("a")
    model.dict["a"] = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)


def set_in_a_list(model: Any) -> None:
    model.list[0] = nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)


def update_a_dict(model: Any) -> None:
    model.dict.update({"a": nn.Parameter(torch.ones(WIDTH, WIDTH), requires_grad=False)})


def of(name: str, build: Callable[[], nn.Module], **options: Any) -> Situation:
    return Situation(name=name, build=build, **{"runs": (EVAL, WATCHED), **options})


def around(layer: Callable[..., nn.Module], *sizes: int, call: Any = None, **options: Any) -> Callable[[], nn.Module]:
    return lambda: Around(layer(*sizes, **options), *(() if call is None else (call,)))


TABLE = [
    *(
        of(
            cls.__name__,
            around(cls, WIDTH, WIDTH),
            runs=(EVAL, WATCHED, LARGE),
            is_limit=cls is AsksForItsClass,
        )
        for cls in CLASSES
    ),
    of("attention-subclass", around(SelfAttention, WIDTH, 2)),
    of("attention-of-its-own", around(OwnAttention, WIDTH, 2)),
    of("attention-by-hand", around(AttentionByHand)),
    of("lstm-all-weights", around(nn.LSTM, WIDTH, WIDTH, call=run_by_all_weights)),
    of("lstm-flattened", around(nn.LSTM, WIDTH, WIDTH, call=run_flattened)),
    of("lstm-in-cpp", around(nn.LSTM, WIDTH, WIDTH, batch_first=True, call=run_in_cpp)),
    of("lstm-weights-by-hand", around(nn.LSTM, WIDTH, WIDTH, call=run_alternative)),
    of("containers", Lists),
    of("containers-sliced", Slices),
    of("dict-replaced", Items, change=replace_in_a_dict, rebased=True),
    of("list-set", Items, change=set_in_a_list, rebased=True),
    of("dict-updated", Items, change=update_a_dict, rebased=True),
]  # fmt: skip


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_classes(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_a_scripted_child_gets_no_adapter() -> None:
    seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), torch.jit.script(nn.Linear(WIDTH, WIDTH)))
    x = torch.randn(3, WIDTH)
    adapted = adapt(model, (x,), sites="0.*")
    assert_close(adapted(x), Oracle(adapted, model).model(x))


def test_attributes_are_set_through_the_adapted_model() -> None:
    seed(1)
    model, x = Around(nn.Linear(WIDTH, WIDTH)), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    oracle = Oracle(adapted, model).model
    changes: list[tuple[str, Any]] = [
        ("call", lambda layer, x: layer(x) * 2),
        ("before", nn.Tanh()),
        ("layer", nn.Linear(WIDTH, WIDTH)),
    ]
    for name, value in changes:
        setattr(adapted, name, value)
        setattr(oracle, name, value)
        assert_close(adapted(x).detach(), oracle(x).detach())
