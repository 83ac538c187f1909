"""Hooks on the model, on what is inside it, on all modules and on tensors, before and after the first call."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

import adapter_compiler as ac
from tests.soundness.common import WIDTH, Run, Situation, make, params
from tests.soundness.oracle import check


def compute(net: Any, x: Tensor) -> Any:
    return net.second(net.inner(torch.tanh(net.first(x))))


def compute_by_keyword(net: Any, x: Tensor) -> Any:
    return net.second(net.first(input=x))


def compute_carefully(net: Any, x: Tensor) -> Any:
    try:
        y = net.inner(x[:, :3])
    except RuntimeError:
        y = x
    return net.second(y) + getattr(net, "seen", 0)


def compute_with_tensor_hook(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * net.scale)
    return net.second(y)


def keep_gradients(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    if y.requires_grad:
        y.retain_grad()
    net.kept = y
    return net.second(y)


def count(net: Any) -> Callable[..., None]:
    """A hook that changes the result of the next call."""

    def hook(*_: Any) -> None:
        net.seen = getattr(net, "seen", 0) + 1

    return hook


def double(module: Any, args: Any, output: Any) -> Any:
    return output * 2


def double_again(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    return output * 2 + kwargs["input"].mean()


def shift_input(module: Any, args: Any) -> Any:
    return (args[0] + 1,)


def shift_keyword(module: Any, args: Any, kwargs: Any) -> Any:
    return args, {"input": kwargs["input"] + 1}


def add_norm(module: Any, args: Any, output: Any) -> Any:
    return output + module.weight.norm()


def use_weight(module: Any, args: Any, output: Any) -> Any:
    return output + args[0] @ module.weight.T


def scale_gradient(module: Any, gradients: Any, outputs: Any) -> Any:
    return tuple(g * 3 if g is not None else None for g in gradients)


def scale_gradient_before(module: Any, outputs: Any) -> Any:
    return tuple(g * 3 if g is not None else None for g in outputs)


def write_weight(module: Any, args: Any) -> None:
    with torch.no_grad():
        module.weight.mul_(0.5)


def set_weight_of_next(net: Any) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        net.second.bias = nn.Parameter(torch.ones(WIDTH), requires_grad=False)

    return hook


def remove_after(register: Callable[[Any], Any]) -> Callable[[Any], None]:
    """A hook that is registered for one call only."""

    def change(net: Any) -> None:
        handle = register(net)
        net(torch.ones(2, WIDTH))
        handle.remove()

    return change


def once(net: Any) -> None:
    """A hook that removes itself after one call."""

    def hook(module: Any, args: Any, output: Any) -> Any:
        handle.remove()
        return output * 2

    handle = net.first.register_forward_hook(hook)


def call_twice(model: Any, x: Tensor) -> Any:
    return model(x), model(x)


def hooked_at_first() -> nn.Module:
    net = make(compute)()
    net.get_submodule("first").register_forward_hook(double)
    return net


def remove_first_hook(net: Any) -> None:
    net.first._forward_hooks.clear()


#: A checkpoint calls the inner modules again in backward, when such hooks are already removed.
OUTSIDE: dict[str, Any] = {"options": {"regions": ("first", "second")}}


#: torch warns about a backward hook on a module if no input requires grad.
BACKWARD: dict[str, Any] = {"args": lambda: (torch.randn(3, WIDTH).requires_grad_(),), "shows_in": ()}


def on(name: str, change: Callable[[Any], object], **options: Any) -> Situation:
    return Situation(name=name, **{"build": make(compute), "change": change, **options})


def on_global(name: str, register: Callable[..., Any], hook: Any, **options: Any) -> Situation:
    @contextlib.contextmanager
    def around() -> Iterator[None]:
        handle = register(hook)
        try:
            yield
        finally:
            handle.remove()

    return Situation(name=name, build=make(compute), later_around=around, **OUTSIDE, **options)


def add_one(module: Any, args: Any, output: Any) -> Any:
    """The adapted model is a module around the user's, which a hook on all modules sees too."""
    return None if isinstance(module, ac.AdaptedModel) else output + 1


def only_linear(hook: Any) -> Any:
    return lambda module, *rest: hook(module, *rest) if isinstance(module, nn.Linear) else None


TABLE = [
    on("forward", lambda net: net.first.register_forward_hook(double)),
    on("forward-on-a-container", lambda net: net.inner.register_forward_hook(double)),
    on("forward-deep-inside", lambda net: net.inner[1].register_forward_hook(double)),
    on("forward-on-the-model", lambda net: net.register_forward_hook(double)),
    on("forward-twice", lambda net: [net.first.register_forward_hook(double) for _ in range(2)]),
    on(
        "forward-first-of-two",
        lambda net: [net.first.register_forward_hook(double), net.first.register_forward_hook(add_norm, prepend=True)],
    ),
    on(
        "forward-with-keywords",
        lambda net: net.first.register_forward_hook(double_again, with_kwargs=True),
        build=make(compute_by_keyword),
    ),
    on("forward-reads-the-weight", lambda net: net.first.register_forward_hook(add_norm)),
    on("forward-computes-with-the-weight", lambda net: net.first.register_forward_hook(use_weight)),
    on(
        "forward-changes-another-module",
        lambda net: net.first.register_forward_hook(set_weight_of_next(net)),
        is_folded=False,
    ),
    on("before", lambda net: net.first.register_forward_pre_hook(shift_input)),
    on("before-the-model", lambda net: net.register_forward_pre_hook(shift_input)),
    on(
        "before-with-keywords",
        lambda net: net.first.register_forward_pre_hook(shift_keyword, with_kwargs=True),
        build=make(compute_by_keyword),
    ),
    on("before-writes-the-weight", lambda net: net.first.register_forward_pre_hook(write_weight), **OUTSIDE),
    on(
        "always",
        lambda net: net.inner[0].register_forward_hook(count(net), always_call=True),
        build=make(compute_carefully),
        call=call_twice,
        is_folded=False,
    ),
    on(
        "not-always",
        lambda net: net.inner[0].register_forward_hook(count(net)),
        build=make(compute_carefully),
        call=call_twice,
        shows_in=(),
    ),
    on("removed", remove_after(lambda net: net.first.register_forward_hook(double)), shows_in=()),
    on("removes-itself", once, call=call_twice, is_folded=False, **OUTSIDE),
    on("there-at-first", remove_first_hook, build=hooked_at_first),
    on("backward", lambda net: net.inner.register_full_backward_hook(scale_gradient), **BACKWARD),
    on("backward-of-a-linear", lambda net: net.second.register_full_backward_hook(scale_gradient), **BACKWARD),
    on("backward-of-the-model", lambda net: net.register_full_backward_hook(scale_gradient), **BACKWARD),
    on("before-backward", lambda net: net.second.register_full_backward_pre_hook(scale_gradient_before), **BACKWARD),
    on("on-a-tensor", lambda net: setattr(net, "scale", 5.0), build=make(compute_with_tensor_hook), shows_in=()),
    on("retained-gradient", lambda net: None, build=make(keep_gradients), shows_in=()),
    on_global("global-forward", global_hooks.register_module_forward_hook, only_linear(double)),
    on_global("global-forward-of-all", global_hooks.register_module_forward_hook, add_one),
    on_global("global-before", global_hooks.register_module_forward_pre_hook, only_linear(shift_input)),
    on_global(
        "global-backward",
        global_hooks.register_module_full_backward_hook,
        only_linear(scale_gradient),
        **BACKWARD,
    ),
    on_global(
        "global-before-backward",
        global_hooks.register_module_full_backward_pre_hook,
        only_linear(scale_gradient_before),
        **BACKWARD,
    ),
]


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_hooks(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)
    assert not global_hooks._has_any_global_hook()
