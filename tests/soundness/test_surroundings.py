"""The environment that a model reads changes between two calls: modes, globals, patches, time."""

from __future__ import annotations

import contextlib
import os
import random
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.soundness.common import EVAL, LARGE, TRAIN, WIDTH, Context, Run, Situation, make, params, setting
from tests.soundness.oracle import check

FLAGS: dict[str, Any] = {"scale": 1.0, "layer": "first"}
CLOCK = 1.0


def asks_grad_mode(net: Any, x: Tensor) -> Any:
    return net.first(x) if torch.is_grad_enabled() else net.second(x)


def asks_inference_mode(net: Any, x: Tensor) -> Any:
    return net.second(x) if torch.is_inference_mode_enabled() else net.first(x)


def asks_activation_requires_grad(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return net.second(y) if y.requires_grad and not y.is_leaf else y


def asks_weight_requires_grad(net: Any, x: Tensor) -> Any:
    return net.first(x) if net.first.weight.requires_grad else net.second(x)


def asks_autocast(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return y if torch.is_autocast_enabled("cpu") else net.second(y)


def asks_dtype(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    return y.float() + 1 if y.dtype == torch.bfloat16 else net.second(y)


def leaves_autocast(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    with torch.autocast("cpu", enabled=False):
        return net.second(y.float())


def enters_autocast(net: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", torch.bfloat16):
        return net.second(net.first(x))


def enters_no_grad(net: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = net.first(x)
    return net.second(y)


def enters_enable_grad(net: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        y = net.first(x)
    return net.second(y), y.requires_grad


def takes_gradient_inside(net: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(net.second(torch.tanh(net.first(x))).sum(), x, create_graph=True)
    return force


def detaches(net: Any, x: Tensor) -> Any:
    return net.second(net.first(x).detach())


def asks_global(net: Any, x: Tensor) -> Any:
    return net.get_submodule(FLAGS["layer"])(x) * FLAGS["scale"]


def asks_environment(net: Any, x: Tensor) -> Any:
    return net.first(x) if os.environ.get("SOUNDNESS_WAY") == "first" else net.second(x)


def asks_clock(net: Any, x: Tensor) -> Any:
    return net.first(x) * time.time()


def asks_random(net: Any, x: Tensor) -> Any:
    return random.choice([net.first, net.second])(x) * (1 + random.random())


def asks_generator(net: Any, x: Tensor) -> Any:
    return net.first(x) + torch.rand(x.shape, generator=torch.Generator().manual_seed(int(FLAGS["scale"])))


def asks_default_dtype(net: Any, x: Tensor) -> Any:
    return net.first(x) + torch.zeros(1), torch.tensor(1.0).dtype


def asks_deterministic(net: Any, x: Tensor) -> Any:
    return net.first(x) if torch.are_deterministic_algorithms_enabled() else net.second(x)


def asks_multithreading(net: Any, x: Tensor) -> Any:
    return net.first(x) if torch.autograd.is_multithreading_enabled() else net.second(x)


def asks_anomaly(net: Any, x: Tensor) -> Any:
    return net.first(x) if torch.is_anomaly_enabled() else net.second(x)


def warns(net: Any, x: Tensor) -> Any:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warnings.warn("seen", UserWarning, stacklevel=1)
    return net.first(x) * len(caught)


def writes_output(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    y.add_(x)
    y[0] *= 2
    y[:, 1:3] = x[:, :2]
    return net.second(y)


def writes_relu(net: Any, x: Tensor) -> Any:
    return net.second(F.relu_(net.first(x)) + 1).mul_(2)


def writes_output_of_output(net: Any, x: Tensor) -> Any:
    y = net.first(x[None])
    y.squeeze_(0)
    return net.second(y).mul_(2).t_()


def autocast(dtype: torch.dtype = torch.bfloat16) -> Context:
    return lambda: torch.autocast("cpu", dtype)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


class Loud(nn.Module):
    """A model with a number and a function as class attributes."""

    factor = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.finish(self.linear(x)) * self.factor

    def finish(self, y: Tensor) -> Any:
        return y


def around(name: str, run: Callable[..., Any], later_around: Context, **options: Any) -> Situation:
    return Situation(name=name, build=make(run), later_around=later_around, **options)


#: A checkpoint runs the inner modules again after the environment was restored, with or without adapters.
OUTSIDE: dict[str, Any] = {"options": {"regions": ("first", "second")}}
#: A patch for a call is not active in its backward.
BEFORE_BACKWARD = (EVAL, TRAIN, LARGE)
ROUGH: dict[str, Any] = {"tolerance": (3e-2, 3e-2), **OUTSIDE}

CLASS_PATCHES: dict[str, Context] = {
    "attribute": lambda: mock.patch.object(Loud, "factor", 3.0),
    "method": lambda: mock.patch.object(Loud, "finish", lambda self, y: y + self.linear(y)),
    "forward": lambda: mock.patch.object(Loud, "forward", lambda self, x: self.linear(x) ** 2),
}

TABLE = [
    *(
        around(f"{f.__name__}-{mode.__name__}".replace("_", "-"), f, mode, shows_in=shows)
        for f, mode, shows in (
            (asks_grad_mode, torch.no_grad, ("eval", "train")),
            (asks_inference_mode, torch.inference_mode, ("eval", "train")),
            (asks_grad_mode, torch.inference_mode, ("eval", "train")),
            (asks_activation_requires_grad, torch.no_grad, ("eval", "train")),
            (asks_weight_requires_grad, torch.no_grad, ()),
            (enters_enable_grad, torch.no_grad, ()),
            (enters_no_grad, torch.no_grad, ()),
            (takes_gradient_inside, torch.no_grad, ()),
            (writes_output, torch.no_grad, ()),
            (writes_relu, torch.inference_mode, ()),
        )
    ),
    *(
        around(f"{f.__name__}-autocast".replace("_", "-"), f, autocast(), shows_in=shows, **ROUGH)
        for f, shows in (
            (asks_autocast, ("eval", "train")), (asks_dtype, ("eval", "train")), (leaves_autocast, ("eval", "train")),
            (enters_autocast, ()), (writes_output, ("eval", "train")),
        )
    ),
    around("autocast-of-other-dtype", asks_dtype, autocast(torch.float16), **ROUGH),
    around("autocast-at-first", asks_dtype, contextlib.nullcontext, around=autocast(), **ROUGH),
    around("no-grad-at-first", asks_grad_mode, contextlib.nullcontext, around=torch.no_grad),
    around("inference-mode-at-first", asks_grad_mode, contextlib.nullcontext, around=torch.inference_mode),
    around("global-number", asks_global, lambda: setting(FLAGS, "scale", 3.0), **OUTSIDE),
    around("global-name-of-a-layer", asks_global, lambda: setting(FLAGS, "layer", "inner"), **OUTSIDE),
    around("global-function", asks_clock, lambda: mock.patch.object(time, "time", lambda: 2.5),
           around=lambda: mock.patch.object(time, "time", lambda: 1.5), **OUTSIDE),
    around("environment", asks_environment, lambda: mock.patch.dict(os.environ, SOUNDNESS_WAY="first"), **OUTSIDE),
    around("function-of-torch-patched", asks_grad_mode, lambda: mock.patch.object(
        F, "linear", lambda x, w, b=None: x @ w.t() * 2), runs=BEFORE_BACKWARD),
    around("forward-of-linear-patched", asks_grad_mode, lambda: mock.patch.object(
        nn.Linear, "forward", lambda self, x: x @ self.weight.t()), runs=BEFORE_BACKWARD),
    around("forward-of-dropout-patched", lambda net, x: net.first(net.drop(x)), lambda: mock.patch.object(
        nn.Dropout, "forward", lambda self, x: x * 3), runs=BEFORE_BACKWARD),
    around("call-of-modules-patched", asks_grad_mode, lambda: mock.patch.object(
        nn.Linear, "__call__", lambda self, x: self.forward(x) + 1, create=True), runs=BEFORE_BACKWARD),
    *(Situation(name=f"class-{name}", build=Loud, later_around=patch, options={"regions": "linear"})
      for name, patch in CLASS_PATCHES.items()),
    around("generator", asks_generator, lambda: setting(FLAGS, "scale", 4.0), **OUTSIDE),
    around("default-dtype", asks_default_dtype, lambda: default_dtype(torch.float64), **OUTSIDE),
    around("deterministic", asks_deterministic, deterministic, **OUTSIDE),
    around("multithreading", asks_multithreading, lambda: torch.autograd.set_multithreading_enabled(False), **OUTSIDE),
    around("anomaly", asks_anomaly, lambda: torch.autograd.set_detect_anomaly(True), **OUTSIDE),
    Situation(name="python-random", build=make(asks_random), **OUTSIDE),
    Situation(name="warnings", build=make(warns), **OUTSIDE),
    Situation(name="detach", build=make(detaches)),
    Situation(name="writes-output", build=make(writes_output)),
    Situation(name="writes-relu", build=make(writes_relu)),
    Situation(name="writes-view-of-output", build=make(writes_output_of_output)),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled")
@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_surroundings(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)
