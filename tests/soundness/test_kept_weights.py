"""Weights that are kept, detached, written by parts or read in other modes than they are used in."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from adapter_compiler.errors import AdapterCompilerError
from tests.soundness.common import EVAL, LARGE, TRAIN, WATCHED, WIDTH, Run, Situation, adapt, make, params, seed
from tests.soundness.oracle import Oracle, assert_close, check
from tests.soundness.random_models import Product


def compute(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.first(x)))


def use_raw(net: Any, x: Tensor) -> Any:
    return F.linear(net.first(x), net.raw) + x @ net.raw


def without_gradient(use: Callable[[Tensor, Any], Any]) -> Callable[[Any, Tensor], Any]:
    """Read a weight where gradients are disabled, and use it where they are enabled."""

    def run(net: Any, x: Tensor) -> Any:
        with torch.no_grad():
            weight = net.first.weight
        return net.second(use(x, weight))

    return run


def transposed_without_gradient(net: Any, x: Tensor) -> Any:
    with torch.no_grad():
        weight = net.first.weight.T
    return net.second(x) + x @ weight


def values_without_gradient(net: Any, x: Tensor) -> Any:
    weight = net.first.weight
    with torch.no_grad():
        y = x @ weight.tril()
    return net.second(y) + x @ weight.tril()


def kept(read: Callable[[Any], Any], use: Callable[[Tensor, Any], Any]) -> Callable[[Any, Tensor], Any]:
    """Read a weight in the first call, and use it in all."""

    def run(net: Any, x: Tensor) -> Any:
        net.kept = getattr(net, "kept", [read(net)])
        return net.second(use(x, net.kept[0]))

    return run


def gradient_of_detached(net: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        weight = net.first.weight.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(F.linear(x, weight).square().sum(), weight)
    return net.second(F.linear(x, weight.detach() - 0.01 * gradient)) + net.first(x)


def parameter_of_weight(net: Any, x: Tensor) -> Any:
    own = nn.Parameter(net.first.weight)
    return net.second(F.linear(x, own.detach())) + net.first(x)


def backward_inside(net: Any, x: Tensor) -> Any:
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        torch.tanh(leaf @ net.first.weight.tril()).sum().backward(inputs=[leaf])
    assert leaf.grad is not None
    return net.second(x @ net.first.weight.tril()) + leaf.grad


def texts(net: Any, x: Tensor) -> Any:
    weight = net.first.weight
    return f"{weight[0, 0]:.3f}", str(weight.detach()), repr(weight.data), weight.tolist(), net.first(x)


def isinstance_of_parts(net: Any, x: Tensor) -> Any:
    weight = net.first.weight
    kinds = [isinstance(w, nn.Parameter) for w in (weight, weight.detach(), weight.data, weight.T, weight[0])]
    return net.first(x) * (1 + sum(kinds))


def write_two_views(net: Any) -> None:
    with torch.no_grad():
        first, second = net.first.weight[:3], net.first.weight[3:]
        first.mul_(2)
        second.zero_()
        first.add_(0.1)


def write_data_of_a_view(net: Any) -> None:
    net.first.weight[1].data.fill_(0.5)
    net.first.weight.data[:, 2].zero_()


def put_into_a_new_layer(net: Any) -> None:
    new = nn.Linear(WIDTH, WIDTH)
    new.weight, new.bias, net.first = net.first.weight, net.first.bias, new


def give_memory_to_a_new_layer(net: Any) -> None:
    new = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    new.weight.data, new.bias, net.first = net.first.weight.data, net.first.bias, new


def replace_by_a_tensor(net: Any) -> None:
    weight = net.first.weight.detach().clone() * 2
    del net.first.weight
    net.first.weight = weight


def triple_gradient(net: Any) -> None:
    net.first.weight.register_hook(lambda gradient: gradient * 3)


def triple_gradient_of_raw(net: Any) -> None:
    net.raw.register_hook(lambda gradient: gradient * 3)


def triple_for_a_while(net: Any) -> None:
    net.first.weight.register_hook(lambda gradient: gradient * 3).remove()


def triple_and_replace(net: Any) -> None:
    triple_gradient(net)
    seed(23)
    net.first.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result * 2 if func is F.linear else result


class Rounded(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        aten = torch.ops.aten
        return result * 2 if func in (aten.mm.default, aten.addmm.default, aten.linear.default) else result


def doubled_inside(net: Any, x: Tensor) -> Any:
    with Doubled():
        return net.second(torch.tanh(net.first(x))) @ net.raw


def freeze_raw(net: Any) -> None:
    net.drop.p = torch.tensor(0.6)


def of(name: str, run: Callable[..., Any], **options: Any) -> Situation:
    return Situation(name=name, **{"build": make(run), "runs": (EVAL, TRAIN, LARGE), **options})


def on(name: str, change: Callable[[Any], object], **options: Any) -> Situation:
    return of(name, compute, change=change, **{"shows_in": (), **options})


FOR_ONE_CALL: dict[str, Any] = {"shows_in": ("eval", "train")}
SITUATIONS = [
    of("function", without_gradient(lambda x, w: Product.apply(x, w))),  # type: ignore[no-untyped-call]
    of("values", without_gradient(lambda x, w: x @ w.tril())),
    of("views", without_gradient(lambda x, w: x @ w.view(WIDTH, WIDTH)[1:7].T @ w.reshape(-1)[:48].view(6, WIDTH))),
    of("whole-slice", without_gradient(lambda x, w: x @ w[:, :WIDTH])),
    of("transposed-without-gradient", transposed_without_gradient),
    of("values-without-gradient", values_without_gradient),
    of("kept-values", kept(lambda net: net.first.weight, lambda x, w: x @ w.tril()), is_folded=False),
    of("kept-transposed", kept(lambda net: net.first.weight.T, lambda x, w: x @ w), is_folded=False),
    of("kept-view", kept(lambda net: net.first.weight[2:6], lambda x, w: F.pad(F.linear(x, w), (2, 2))),
       is_folded=False),
    of("kept-from-no-grad", kept(lambda net: net.first.weight, lambda x, w: x @ w.tril()), is_folded=False,
       around=torch.no_grad, later_around=contextlib.nullcontext, shows_in=()),
    of("kept-from-inference-mode", kept(lambda net: net.first.weight, lambda x, w: x @ w.tril()), is_folded=False,
       around=torch.inference_mode, later_around=contextlib.nullcontext, shows_in=()),
    of("gradient-of-detached", gradient_of_detached),
    of("parameter-of-weight", parameter_of_weight),
    of("backward-inside", backward_inside),
    of("texts", texts),
    of("isinstance", isinstance_of_parts),
    of("dropout-with-a-tensor", lambda net, x: net.second(net.drop(net.first(x))), change=freeze_raw,
       shows_in=("train",)),
    on("two-views-written", write_two_views),
    on("data-of-a-view-written", write_data_of_a_view),
    on("put-into-a-new-layer", put_into_a_new_layer),
    on("memory-given-to-a-new-layer", give_memory_to_a_new_layer),
    on("replaced-by-a-tensor", replace_by_a_tensor, has_gradients=False),
    on("hooked", triple_gradient, is_folded=False),
    on("hooked-for-a-while", triple_for_a_while, is_folded=False),
    on("hooked-and-replaced", triple_and_replace, is_folded=False, rebased=True),
    of("hooked-raw", use_raw, change=triple_gradient_of_raw, is_folded=False, shows_in=(), runs=(EVAL, WATCHED)),
    of("mode-of-functions", compute, later_around=Doubled, **FOR_ONE_CALL),
    of("mode-of-functions-raw", use_raw, later_around=Doubled, runs=(EVAL, WATCHED, LARGE), **FOR_ONE_CALL),
    of("mode-of-functions-inside", doubled_inside, runs=(EVAL, WATCHED, LARGE)),
    of("mode-of-operators", compute, later_around=Rounded, **FOR_ONE_CALL),
    of("mode-of-operators-raw", use_raw, later_around=Rounded, runs=(EVAL, WATCHED, LARGE), **FOR_ONE_CALL),
]  # fmt: skip

#: All of them also without the fused functions.
TABLE = [
    variant
    for one in SITUATIONS
    for variant in (one, Situation(**{**vars(one), "name": f"{one.name}-plain", "options": {"fused": False}}))
]


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_kept_weights(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


@pytest.mark.parametrize("fused", [True, False])
def test_no_hook_runs_after_a_gradient_that_does_not_exist(fused: bool) -> None:
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,), fused=fused)
    weight: Any = adapted.module.get_submodule("first").weight
    with pytest.raises(AdapterCompilerError, match=r"first\.weight has an adapter and accumulates no gradient"):
        weight.register_post_accumulate_grad_hook(lambda parameter: None)


def test_a_hook_stays_when_adapters_are_attached_again() -> None:
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    seen: list[int] = []
    weight: Any = adapted.module.get_submodule("first").weight
    handle = weight.register_hook(lambda gradient: seen.append(1))
    adapted.double()
    adapted(x.double()).sum().backward()
    assert len(seen) == 1
    handle.remove()
    adapted(x.double()).sum().backward()
    assert len(seen) == 1


def test_hooks_belong_to_one_of_two_parameters() -> None:
    seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH))
    model[1].weight = model[0].weight
    adapted, x = adapt(model, (torch.randn(3, WIDTH),)), torch.randn(3, WIDTH)
    first, second = adapted.module.children()
    seen: list[str] = []
    weight: Any = second.weight
    handle = weight.register_hook(lambda gradient: seen.append("shared"))
    first.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))
    adapted(x).sum().backward()
    assert seen == ["shared"]
    weight = first.weight
    weight.register_hook(lambda gradient: seen.append("first"))
    adapted(x).sum().backward()
    assert sorted(seen) == ["first", "shared", "shared"]
    handle.remove()
    adapted(x).sum().backward()
    assert sorted(seen) == ["first", "first", "shared", "shared"]


def test_a_write_through_one_read_is_seen_by_another() -> None:
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    layer: Any = adapted.module.get_submodule("first")
    kept_weight, kept_row = layer.weight, layer.weight[0]
    before = kept_weight.norm().item(), kept_row.norm().item()
    with torch.no_grad():
        layer.weight.mul_(2)
    assert_close([kept_weight.norm().item(), kept_row.norm().item()], [2 * before[0], 2 * before[1]])
    assert_close(Oracle(adapted, adapted.copy_base()).model(x).detach(), adapted(x).detach())
