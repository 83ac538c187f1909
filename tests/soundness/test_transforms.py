"""Derivatives of every kind, batching, checkpoints and hooks on saved tensors, inside a model and around it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.soundness.common import EVAL, IS_NIGHT, LARGE, TRAIN, WATCHED, WIDTH, Run, Situation, make, params
from tests.soundness.oracle import check


def compute(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.inner(net.norm(net.first(x)))))


def use_raw(net: Any, x: Tensor) -> Any:
    return torch.tanh(net.first(x) @ net.raw) @ net.raw.t() + F.linear(x, net.raw) @ net.raw[:, :WIDTH]


class Mixed(nn.Module):
    """An embedding, a convolution and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv = nn.Embedding(5, WIDTH), nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.attend = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.head = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Any:
        y = x + self.embed(torch.arange(x.shape[-2]) % 5)
        y = torch.tanh(self.conv(y.mT).mT)
        return self.head(self.attend(y, y, y)[0])


def loss(model: Any) -> Callable[[Tensor], Any]:
    return lambda x: model(x).square().sum()


def tangent(x: Tensor) -> Tensor:
    return torch.cos(torch.arange(x.numel(), dtype=x.dtype)).view_as(x)


def double_backward(model: Any, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(loss(model)(x), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
    return first, second


def gradient_penalty(model: Any, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    y = model(x)
    (force,) = torch.autograd.grad(y, x, torch.ones_like(y), create_graph=True)
    return y.sum() + (force.norm(dim=-1) - 1).square().sum()


def forward_mode(model: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        result = forward_ad.unpack_dual(model(forward_ad.make_dual(x, tangent(x))))
        return result.primal, result.tangent


def forward_over_reverse(model: Any, x: Tensor) -> Any:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.detach().requires_grad_(), tangent(x))
        (found,) = torch.autograd.grad(loss(model)(dual), dual, create_graph=True)
        return forward_ad.unpack_dual(found).tangent


def batched_gradients(model: Any, x: Tensor) -> Any:
    x = x.detach().requires_grad_()
    y = model(x)
    many = torch.eye(y.numel()).view(-1, *y.shape)
    return torch.autograd.grad(y, x, many, is_grads_batched=True)[0]


def batched_gradients_of_weights(model: Any, x: Tensor) -> Any:
    y = model(x)
    many = torch.eye(y.numel()).view(-1, *y.shape)
    wanted = [p for name, p in model.named_parameters() if p.requires_grad and "first" in name]
    # The weights have other gradients than the adapters, but errors of batching would show in those of later products.
    with contextlib.suppress(IndexError):
        torch.autograd.grad(y, wanted[0], many, is_grads_batched=True, retain_graph=True)
    return y


def twice_backward(model: Any, x: Tensor) -> Any:
    y = model(x)
    if y.requires_grad:
        y.sum().backward(retain_graph=True)
        y.sum().backward(retain_graph=True)
    return y


def vjp_of(model: Any, x: Tensor) -> Any:
    found = vjp(model, x)
    return found[0], found[1](tangent(found[0]))


def linearized(model: Any, x: Tensor) -> Any:
    found = linearize(model, x)
    return found[0], found[1](tangent(x))


CALLS: dict[str, Callable[..., Any]] = {
    "double-backward": double_backward,
    "gradient-penalty": gradient_penalty,
    "forward-mode": forward_mode,
    "forward-over-reverse": forward_over_reverse,
    "batched-gradients": batched_gradients,
    "batched-gradients-of-weights": batched_gradients_of_weights,
    "twice-backward": twice_backward,
    "grad": lambda m, x: grad(loss(m))(x),
    "grad-and-value": lambda m, x: grad_and_value(loss(m))(x),
    "grad-of-grad": lambda m, x: grad(lambda x: grad(loss(m))(x).square().sum())(x),
    "vjp": vjp_of,
    "jvp": lambda m, x: jvp(m, (x,), (tangent(x),)),
    "jvp-of-grad": lambda m, x: jvp(grad(loss(m)), (x,), (tangent(x),)),
    "jacrev": lambda m, x: jacrev(m)(x),
    "jacfwd": lambda m, x: jacfwd(m)(x),
    "jacfwd-of-jacrev": lambda m, x: jacfwd(jacrev(loss(m)))(x),
    "hessian": lambda m, x: hessian(loss(m))(x),
    "linearize": linearized,
    "vmap": lambda m, x: vmap(m)(x[None].repeat(2, *[1] * x.dim())),
    "vmap-of-grad": lambda m, x: vmap(grad(loss(m)))(torch.stack([x, x * 2])),
    "vmap-of-jvp": lambda m, x: vmap(lambda t: jvp(m, (x,), (t,))[1])(torch.stack([x, x * 2])),
    "vmap-over-the-last": lambda m, x: vmap(m, in_dims=-1, out_dims=1)(torch.stack([x, x * 2], -1)),
    "vmap-in-chunks": lambda m, x: vmap(m, chunk_size=1)(torch.stack([x, x * 2])),
    "jacobian": lambda m, x: torch.autograd.functional.jacobian(m, x),
    "jacobian-vectorized": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True),
    "jacobian-forward": lambda m, x: torch.autograd.functional.jacobian(m, x, vectorize=True, strategy="forward-mode"),
    "hessian-vectorized": lambda m, x: torch.autograd.functional.hessian(loss(m), x, vectorize=True),
    "hessian-forward": lambda m, x: torch.autograd.functional.hessian(
        loss(m), x, vectorize=True, outer_jacobian_strategy="forward-mode"
    ),
    "hvp": lambda m, x: torch.autograd.functional.hvp(loss(m), x, tangent(x)),
    "vhp": lambda m, x: torch.autograd.functional.vhp(loss(m), x, tangent(x)),
}

#: The transforms that are tried with other models: by default every third.
SOME = {name: call for i, (name, call) in enumerate(CALLS.items()) if name != "linearize" and (IS_NIGHT or i % 3 == 0)}
#: torch's transforms do not support checkpoints.
RUNS = (EVAL, TRAIN, LARGE)
RAW_RUNS = (WATCHED, LARGE)
MIXED_RUNS = (LARGE,)


def in_a_checkpoint(reentrant: bool) -> Callable[..., Any]:
    def run(net: Any, x: Tensor) -> Any:
        y = net.first(x)
        return net.second(checkpoint(lambda y: net.inner(net.drop(y)), y, use_reentrant=reentrant))

    return run


def in_a_checkpoint_of_segments(net: Any, x: Tensor) -> Any:
    return net.second(checkpoint_sequential(net.inner, 2, net.first(x), use_reentrant=False))


def in_nested_checkpoints(net: Any, x: Tensor) -> Any:
    def inside(y: Tensor) -> Any:
        return checkpoint(net.inner, net.second(y), use_reentrant=False)

    return checkpoint(inside, net.first(x), use_reentrant=False)


@contextlib.contextmanager
def negated_in_memory() -> Iterator[None]:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.neg(), lambda t: t.neg()):
        yield


def packing_inside(net: Any, x: Tensor) -> Any:
    with negated_in_memory(), torch.autograd.graph.save_on_cpu():
        y = F.gelu(net.first(x))
    return net.second(F.dropout(net.norm(y), 0.5, net.training))


def saved_tensors_seen(net: Any, x: Tensor) -> Any:
    y = F.gelu(net.first(x))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return net.second(net.drop(y))


def of(name: str, run: Callable[..., Any], **options: Any) -> Situation:
    return Situation(name=name, build=make(run), **options)


TABLE = [
    *(
        Situation(name=name, build=make(compute), call=call, runs=RUNS, is_folded=False)
        for name, call in CALLS.items()
        if IS_NIGHT or name != "linearize"  # tracing takes seconds
    ),
    *(
        Situation(name=f"{name}-raw", build=make(use_raw), call=call, runs=RAW_RUNS, is_folded=False)
        for name, call in SOME.items()
    ),
    *(
        Situation(
            name=f"{name}-mixed",
            build=Mixed,
            args=lambda: (torch.randn(2, 3, WIDTH),),
            call=call,
            runs=MIXED_RUNS,
            is_folded=False,
            # torch's attention does not support backward over forward mode.
            has_gradients=not name.startswith("forward"),
        )
        for name, call in SOME.items()
        if name not in ("vmap-in-chunks", "vmap-over-the-last")
    ),
    *(
        Situation(
            name=f"{name}-dora", build=make(use_raw), call=CALLS[name], runs=RAW_RUNS, options={"kind": "dora"},
            is_folded=False, has_gradients=False,
        )
        for name in ("double-backward", "forward-mode", "jvp", "vmap-of-grad", "jacrev", "hessian-vectorized")
    ),
    of("checkpoint", in_a_checkpoint(False)),
    of("reentrant-checkpoint", in_a_checkpoint(True)),
    of("checkpoint-of-segments", in_a_checkpoint_of_segments),
    of("checkpoints-in-checkpoints", in_nested_checkpoints),
    of("saved-tensors-packed-inside", packing_inside),
    of("saved-tensors-packed-later", saved_tensors_seen),
    of("saved-tensors-packed-around", compute, later_around=negated_in_memory, shows_in=()),
    of("saved-on-the-host", packing_inside, later_around=torch.autograd.graph.save_on_cpu, shows_in=()),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node:UserWarning")  # a warning of torch's linearize
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of torch's forward mode
@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_transforms(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)
