"""Large activations, for which less memory is kept: what models do to them between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import hessian, jacfwd, jacrev, vmap
from torch.utils.checkpoint import checkpoint

from tests.soundness.common import LARGE, TRAIN, WIDTH, Run, Situation, make, params
from tests.soundness.oracle import check

Activation = Callable[[Any, Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": lambda net, y: F.gelu(y),
    "gelu-tanh": lambda net, y: F.gelu(y, approximate="tanh"),
    "silu": lambda net, y: F.silu(y),
    "silu-in-place": lambda net, y: F.silu(y, inplace=True),
    "norm": lambda net, y: net.norm(y),
    "norm-without-weight": lambda net, y: F.layer_norm(y, (WIDTH,)),
    "norm-without-bias": lambda net, y: F.layer_norm(y, (WIDTH,), net.norm.weight),
    "norm-of-two-dimensions": lambda net, y: F.layer_norm(y, tuple(y.shape[-2:])),
    "dropout": lambda net, y: net.drop(y),
    "dropout-transposed": lambda net, y: net.drop(y.mT).mT,
    "dropout-in-place": lambda net, y: F.dropout(y, 0.3, net.training, inplace=True),
}


def write_without_gradient(y: Tensor) -> Tensor:
    with torch.no_grad():
        y.mul_(0.5)
    return y


def write_row_without_gradient(y: Tensor) -> Tensor:
    with torch.no_grad():
        y[0] = 0.25
    return y


def write_data(y: Tensor) -> Tensor:
    y.data.clamp_(max=0.4)
    return y


def hook(y: Tensor) -> Tensor:
    y.register_hook(lambda gradient: gradient * 2)
    return y


def hook_if_differentiated(y: Tensor) -> Tensor:
    return hook(y) if y.requires_grad else y


#: Changes that a model makes to an activation before an adapted layer reads it.
BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "as-it-is": lambda y: y,
    "written": lambda y: y.mul(1.0).add_(0.5),
    "written-without-gradient": write_without_gradient,
    "row-written-without-gradient": write_row_without_gradient,
    "data-written": write_data,
    "viewed": lambda y: y.view(-1, 4, 2).view(-1, WIDTH),
    "viewed-larger": lambda y: y.view(1, -1, WIDTH),
    "transposed": lambda y: y.mT.contiguous().mT,
    "expanded": lambda y: y.expand(2, *y.shape),
    "sliced": lambda y: y[1:],
    "detached": lambda y: y.detach(),
    "hooked": hook_if_differentiated,
}


def between(activation: Activation, change: Callable[[Tensor], Tensor]) -> Callable[[], nn.Module]:
    return make(lambda net, x: net.second(change(activation(net, net.first(x)))))


def read_three_times(net: Any, x: Tensor) -> Any:
    y = F.gelu(net.first(x))
    return net.second(y) + net.first(y) + y @ net.raw


def hooked_always(net: Any, x: Tensor) -> Any:
    return net.second(hook(F.gelu(net.first(x))))


def written_after(net: Any, x: Tensor) -> Any:
    y = F.gelu(net.first(x))
    z = net.second(y)
    y.mul_(2)
    return z


def input_written_after(net: Any, x: Tensor) -> Any:
    y = net.first(x)
    z = net.second(F.gelu(y))
    with torch.no_grad():
        y.mul_(2)
    return z


def norm_changed_after(net: Any, x: Tensor) -> Any:
    z = net.second(net.norm(net.first(x)))
    net.norm.weight.data.mul_(3)
    return z


def in_a_checkpoint(net: Any, x: Tensor) -> Any:
    return checkpoint(lambda y: net.second(F.gelu(y)), net.first(x), use_reentrant=False)


def backward_under_autocast(model: Any, x: Tensor) -> Any:
    y = model(x)
    if y.requires_grad:
        with torch.autocast("cpu", torch.bfloat16):
            y.square().sum().backward(retain_graph=True)
    return y


def twice_differentiated(model: Any, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(first.square().sum(), x, create_graph=True)


def batched_gradients(model: Any, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    y = model(x)
    return torch.autograd.grad(y, x, torch.eye(y.numel()).view(-1, *y.shape), is_grads_batched=True)[0]


TRANSFORMS: dict[str, Callable[..., Any]] = {
    "twice": twice_differentiated,
    "batched": batched_gradients,
    "vmap": lambda m, x: vmap(m, randomness="different")(torch.stack([x, x])),
    "vmap-same": lambda m, x: vmap(m, randomness="same")(torch.stack([x, x])),
    "jacobians": lambda m, x: (jacfwd(m, randomness="same")(x), jacrev(m)(x)),
    "hessian": lambda m, x: torch.autograd.functional.hessian(lambda x: m(x).square().sum(), x, vectorize=True),
}


class WithWrittenGelu(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from transformers.activations import NewGELUActivation

        self.first, self.gelu, self.second = nn.Linear(WIDTH, WIDTH), NewGELUActivation(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        return self.second(self.gelu(self.first(x)))


def add_hook(model: Any) -> None:
    model.gelu.register_forward_hook(lambda module, args, y: y * 2)


def large(name: str, build: Callable[[], nn.Module], **options: Any) -> Situation:
    return Situation(name=name, build=build, **{"runs": (LARGE,), **options})


def draw_many() -> tuple[Any, ...]:
    return (torch.randn(2, 3, 4, WIDTH),)


#: Situations that depend on recomputation in backward.
AGAIN = ("gelu", "gelu-tanh", "silu", "norm")
KEPT = {"recompute": False}

TABLE = [
    *(
        large(f"{name}-{way}", between(activation, change), is_limit=way == "data-written" and "dropout" not in name)
        for name, activation in ACTIVATIONS.items()
        for way, change in BETWEEN.items()
        if not (name == "norm-of-two-dimensions" or "in-place" in name) or way in ("as-it-is", "viewed", "sliced")
    ),
    *(
        large(f"{name}-{way}", between(ACTIVATIONS[name], BETWEEN["as-it-is"]), call=call)
        for name in ("gelu", "silu", "norm", "dropout")
        for way, call in TRANSFORMS.items()
        if name != "dropout" or way not in ("jacobians", "hessian")
    ),
    large("read-three-times", make(read_three_times)),
    large("hooked-always", make(hooked_always), runs=(TRAIN, LARGE)),
    large("written-after", make(written_after), raises=True),
    large("input-written-after", make(input_written_after), raises=True),
    large("norm-changed-before-backward", make(norm_changed_after)),
    *(large(f"{name}-data-written-kept", between(ACTIVATIONS[name], write_data), options=KEPT) for name in AGAIN),
    large("in-a-checkpoint", make(in_a_checkpoint)),
    large("backward-under-autocast", make(read_three_times), call=backward_under_autocast, tolerance=(4e-2, 4e-2)),
    large("four-dimensions", make(read_three_times), args=draw_many),
    large("vector", make(lambda net, x: net.second(F.gelu(net.first(x)))), args=lambda: (torch.randn(WIDTH),)),
    large("transposed-input", make(read_three_times), args=lambda: (torch.randn(WIDTH, 3).t(),)),
    large("written-gelu", WithWrittenGelu),
    large("written-gelu-hooked", WithWrittenGelu, change=add_hook),
    large("written-gelu-hessian", WithWrittenGelu, call=lambda m, x: hessian(lambda x: m(x).sum())(x)),
    *(large(f"written-gelu-{way}", WithWrittenGelu, call=call) for way, call in TRANSFORMS.items() if way != "hessian"),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_activations(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)
