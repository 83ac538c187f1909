"""The contents of a module change between two calls: attributes, submodules, parameters, modes, classes."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.soundness.common import EVAL, TRAIN, WIDTH, WITH_EXAMPLE, Run, Situation, make, params, put, seed
from tests.soundness.oracle import check


def use_all(net: Any, x: Tensor) -> Any:
    y = net.drop(torch.tanh(net.first(x)))
    y = net.norm(net.inner(y) + net.shift) * net.table["scale"] * net.scale + net.plain
    return net.second(y) if net.flag else y


def use_norm_bias(net: Any, x: Tensor) -> Any:
    y = net.first(net.norm(x))
    return y if net.norm.bias is not None else y * 2


def use_batch_norm(net: Any, x: Tensor) -> Any:
    return net.second(net.batch(net.first(x)))


def use_first(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.first(x)))


def use_raw(net: Any, x: Tensor) -> Any:
    return net.first(x) @ net.raw


def use_dropout(net: Any, x: Tensor) -> Any:
    return net.second(net.drop(net.first(x)))


def train_then_evaluate(model: Any, x: Tensor) -> Any:
    return model.train()(x), model.eval()(x)


def fresh(bias: bool = True) -> nn.Linear:
    return nn.Linear(WIDTH, WIDTH, bias=bias)


def fresh_weight() -> nn.Parameter:
    return nn.Parameter(torch.randn(WIDTH, WIDTH))


def remove_statistics(net: Any) -> None:
    net.batch.track_running_stats = False
    net.batch.running_mean = net.batch.running_var = None


def swap(net: Any) -> None:
    net.first, net.second = net.second, net.first


def use_one_for_both(net: Any) -> None:
    net.second = net.first


def wrap(net: Any) -> None:
    net.first = nn.Sequential(nn.Tanh(), net.first, nn.Tanh())


def delete_from_a_sequence(net: Any) -> None:
    del net.inner[1]


def reverse_a_sequence(net: Any) -> None:
    net.inner = nn.Sequential(*reversed(list(net.inner)))


def become_parameter(net: Any) -> None:
    del net.plain
    net.plain = nn.Parameter(torch.linspace(0, 3, WIDTH), requires_grad=False)


def new_module(net: Any) -> None:
    net.added = nn.Linear(WIDTH, WIDTH)
    net.added.weight = net.first.weight
    net.run = lambda self, x: self.first(x) * 2


def load(net: Any, *, assign: bool) -> None:
    seed(23)
    state = {key: torch.randn(value.shape) for key, value in net.state_dict().items() if value.is_floating_point()}
    if assign:
        state = {key: nn.Parameter(value) if "weight" in key else value for key, value in state.items()}
    net.load_state_dict(state, strict=False, assign=assign)


def load_one(net: Any) -> None:
    seed(23)
    net.first.load_state_dict({"weight": torch.randn(WIDTH, WIDTH), "bias": torch.zeros(WIDTH)})


def initialize(net: Any) -> None:
    seed(23)
    nn.init.xavier_normal_(net.first.weight)


def reset(net: Any) -> None:
    seed(23)
    net.first.reset_parameters()


def copy_into(net: Any) -> None:
    seed(23)
    with torch.no_grad():
        net.first.weight.copy_(torch.randn(WIDTH, WIDTH))


def copy_into_data(net: Any) -> None:
    seed(23)
    net.first.weight.data.copy_(torch.randn(WIDTH, WIDTH))


def set_data(net: Any) -> None:
    seed(23)
    net.first.weight.data = torch.randn(WIDTH, WIDTH)


def write(net: Any, arithmetic: Callable[[Any], object]) -> None:
    with torch.no_grad():
        arithmetic(net.first.weight)


WRITES: dict[str, Callable[[Any], object]] = {
    "mul": lambda w: w.mul_(0.5),
    "add": lambda w: w.add_(torch.eye(WIDTH)),
    "clamp": lambda w: w.clamp_(-0.2, 0.2),
    "div-data": lambda w: w.data.div_(2),
    "detached-mul": lambda w: w.detach().mul_(2),
    "row-zero": lambda w: w[0].zero_(),
    "row-assigned": lambda w: w.__setitem__(0, 1.0),
    "data-column-assigned": lambda w: w.data.__setitem__((slice(None), 1), 2.0),
    "slice-doubled": lambda w: w[:, 2:4].mul_(2),
    "view-filled": lambda w: w.view(-1)[:5].fill_(1.0),
    "transposed-doubled": lambda w: w.T.mul_(2),
    "transposed-row": lambda w: w.t()[1].fill_(0.5),
    "mask-assigned": lambda w: w.__setitem__(w.abs() < 0.3, 0.0),
    "mask-filled": lambda w: w.masked_fill_(w > 0, 0.1),
    "index-filled": lambda w: w.index_fill_(0, torch.tensor([1, 2]), 0.0),
    "diagonal": lambda w: w.fill_diagonal_(1.0),
    "diagonal-view": lambda w: w.diagonal().add_(1.0),
    "out": lambda w: torch.mul(w, 2.0, out=w),
    "chunk": lambda w: w.chunk(2)[1].mul_(-1),
    "renorm": lambda w: w.renorm_(2, 0, 0.5),
    "lerp": lambda w: w.lerp_(torch.eye(WIDTH), 0.5),
    "foreach": lambda w: torch._foreach_mul_([w], 0.5),
    "reshape": lambda w: w.reshape(2, -1).mul_(2),
}


class Louder(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x) * 2


class OwnProduct(nn.Linear):
    def forward(self, x: Tensor) -> Any:
        return torch.einsum("bi,oi->bo", x, self.weight) - self.bias


class Constant(nn.LayerNorm):
    def forward(self, x: Tensor) -> Any:
        return x * 2


def change_class(path: str, cls: type[nn.Module]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        net.get_submodule(path).__class__ = cls

    return change


def replace_forward(path: str, forward: Callable[..., Any]) -> Callable[[Any], None]:
    def change(net: Any) -> None:
        module = net.get_submodule(path)
        module.forward = types.MethodType(forward, module)

    return change


def wrap_forward(net: Any) -> None:
    inside = net.first.forward
    net.first.forward = lambda x: inside(x) * 2


def partial_forward(net: Any) -> None:
    net.inner.forward = functools.partial(torch.add, net.shift)


class Holds(nn.Module):
    """Keeps modules, weights and methods in containers that torch does not search."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.modules_in_a_list = [self.first]
        self.modules_in_a_dict = {"one": self.first}
        self.weights_in_a_list = [self.first.weight]
        self.method = self.first.forward
        self.config = types.SimpleNamespace(scale=1.0, inner=types.SimpleNamespace(layers=[1, 2]))
        self.calls, self.history, self.mean = 0, [torch.zeros(())], torch.zeros(WIDTH)
        object.__setattr__(self, "hidden", self.second)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        y = self.second(x)
        if self.way == "list":
            return y + self.modules_in_a_list[0](x)
        if self.way == "dict":
            return y + self.modules_in_a_dict["one"](x)
        if self.way == "weights":
            return y + x @ self.weights_in_a_list[0].T + self.first(x)
        if self.way == "method":
            return y + self.method(x)
        if self.way == "hidden":
            hidden: Any = self.hidden
            return y + hidden(y)
        if self.way == "config":
            return y * self.config.scale + sum(self.config.inner.layers) + self.first(x)
        self.history.append(y.detach().mean())
        self.mean = self.mean * 0.5 + y.detach().mean(0)
        return y * self.calls + sum(self.history) + self.mean + self.first(x)


def holds(way: str) -> Callable[[], nn.Module]:
    return lambda: Holds(way)


def change_config(net: Any) -> None:
    net.config.scale = 3.0
    net.config.inner.layers.append(5)


def clear_history(net: Any) -> None:
    net.calls = 10
    net.history.clear()


def on(name: str, change: Callable[[Any], object], **options: Any) -> Situation:
    return Situation(name=name, **{"build": make(use_all), "change": change, **options})


TRAIN_ONLY, EVAL_ONLY = ("train",), ("eval",)

#: A checkpoint runs the inner modules twice, so batch normalization counts twice, with or without adapters.
OUTSIDE: dict[str, Any] = {"options": {"regions": ("first", "second")}}
BATCH_NORM: dict[str, Any] = {"build": make(use_batch_norm), **OUTSIDE}

TABLE = [
    on("dropout-off", put("drop.p", 0.0), shows_in=TRAIN_ONLY),
    on("dropout-stronger", put("drop.p", 0.9), shows_in=TRAIN_ONLY),
    on("dropout-of-everything", put("drop.p", 1.0), shows_in=TRAIN_ONLY),
    on("dropout-in-place", put("drop.inplace", True), build=make(use_dropout), shows_in=()),
    on("dropout-replaced", put("drop", nn.Identity), shows_in=TRAIN_ONLY),
    on("dropout-evaluates", lambda net: net.drop.eval(), shows_in=TRAIN_ONLY),
    on("dropout-trains", lambda net: net.drop.train(), shows_in=EVAL_ONLY),
    on("norm-eps", put("norm.eps", 5.0)),
    on("norm-weight", put("norm.weight", lambda: nn.Parameter(torch.randn(WIDTH)))),
    on("norm-without-bias", put("norm.bias", None), build=make(use_norm_bias)),
    on("batch-norm-eps", put("batch.eps", 5.0), **BATCH_NORM),
    on("batch-norm-momentum", put("batch.momentum", 0.9), **BATCH_NORM, call=train_then_evaluate),
    on("batch-norm-momentum-none", put("batch.momentum", None), **BATCH_NORM, call=train_then_evaluate),
    on("batch-norm-without-statistics", remove_statistics, **BATCH_NORM, shows_in=EVAL_ONLY),
    on("batch-norm-evaluates", lambda net: net.batch.eval(), **BATCH_NORM, shows_in=TRAIN_ONLY),
    on("flag", put("flag", False)),
    on("number", put("scale", 3.0)),
    on("number-as-tensor", put("scale", lambda: torch.tensor(3.0))),
    on("table", lambda net: net.table.update(scale=2.0)),
    on("plain-tensor", put("plain", lambda: torch.randn(WIDTH))),
    on("plain-tensor-in-place", lambda net: net.plain.add_(2)),
    on("plain-tensor-becomes-parameter", become_parameter),
    on("buffer", put("shift", lambda: torch.randn(WIDTH))),
    on("buffer-in-place", lambda net: net.shift.mul_(-3)),
    on("function", put("run", lambda: use_first)),
    on("submodule-replaced", put("first", fresh)),
    on("submodule-replaced-by-a-function-of-torch", put("inner", nn.Tanh)),
    on("submodule-in-a-sequence-replaced", lambda net: net.inner.__setitem__(0, fresh_seeded())),
    on("submodule-deleted", delete_from_a_sequence),
    on("submodule-appended", lambda net: net.inner.append(nn.Tanh())),
    on("submodules-reversed", reverse_a_sequence),
    on("submodules-swapped", swap),
    on("submodule-shared", use_one_for_both),
    on("submodule-wrapped", wrap),
    on("submodule-evaluates", lambda net: net.inner.eval(), shows_in=()),
    on("module-added", new_module),
    on("parameter-replaced", put("first.weight", fresh_weight), rebased=True),
    on("parameter-without-gradient", put("first.weight", lambda: fresh_weight().requires_grad_(False)), rebased=True),
    on("raw-parameter-replaced", put("raw", fresh_weight), build=make(use_raw), rebased=True, runs=WITH_EXAMPLE),
    on("data-replaced", set_data),
    on("initialized", initialize),
    on("reset", reset),
    on("copied", copy_into),
    on("data-copied", copy_into_data),
    on("loaded", lambda net: load(net, assign=False), rebased=True),
    on("loaded-by-assignment", lambda net: load(net, assign=True), rebased=True),
    on("submodule-loaded", load_one, rebased=True),
    on("bias-none", put("first.bias", None)),
    on("bias-replaced", put("first.bias", lambda: nn.Parameter(torch.ones(WIDTH)))),
    on("bias-in-place", lambda net: net.first.bias.data.add_(1)),
    on("bias-trains", lambda net: net.first.bias.requires_grad_(True), shows_in=()),
    *(on(f"write-{name}", functools.partial(write, arithmetic=f), runs=(EVAL, TRAIN)) for name, f in WRITES.items()),
    on("class", change_class("first", Louder)),
    on("class-with-a-product-of-its-own", change_class("first", OwnProduct)),
    on("class-without-adapter", change_class("norm", Constant)),
    on("forward", replace_forward("first", lambda self, x: x @ self.weight - 1)),
    on("forward-of-a-sequence", replace_forward("inner", lambda self, x: self[2](x))),
    on("forward-of-all", replace_forward("", lambda self, x: self.second(x))),
    on("forward-wrapped", wrap_forward),
    on("forward-partial", partial_forward),
    on("modules-in-a-list", lambda net: net.modules_in_a_list.insert(0, net.second), build=holds("list")),
    on("modules-in-a-dict", lambda net: net.modules_in_a_dict.update(one=net.second), build=holds("dict")),
    on("weights-in-a-list", lambda net: net.weights_in_a_list.reverse(), build=holds("weights"), shows_in=()),
    on("method-kept", put("method", lambda: torch.tanh), build=holds("method")),
    on("module-hidden", lambda net: object.__setattr__(net, "hidden", nn.Tanh()), build=holds("hidden")),
    on("nested-config", change_config, build=holds("config")),
    on("counter-and-history", clear_history, build=holds("state"), **OUTSIDE),
]


def fresh_seeded() -> nn.Linear:
    seed(23)
    return fresh()


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_module_state(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)
