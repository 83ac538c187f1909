"""Uses of the weights without a call of the model: methods, submodules, properties, generation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from tests.soundness.common import WIDTH, WITH_EXAMPLE, Run, Situation, adapt, params, put, seed
from tests.soundness.oracle import Oracle, assert_close, check


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Any:
        return x + self.drop(torch.tanh(self.linear(x)))

    @staticmethod
    def apply_weight(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)


class Encoder(nn.Module):
    """A model with many methods besides forward."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()
        self.layers = nn.ModuleList([Block(), Block()])
        self.named = nn.ModuleDict({"head": nn.Linear(WIDTH, 4)})
        self.sequence = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)
        self.memory: list[Tensor] = []
        self.scale = 1.0

    def forward(self, x: Tensor) -> Any:
        return self.head(self.encode(x) @ self.raw)

    def encode(self, x: Tensor, *, times: int = 1) -> Any:
        for _ in range(times):
            x = self.sequence(self.block(x)) * self.scale
            for layer in self.layers:
                x = layer(x)
        return x

    def project(self, x: Tensor) -> Tensor:
        return F.linear(x, self.block.linear.weight, self.block.linear.bias)

    def tied(self, x: Tensor) -> Tensor:
        return F.linear(x, self.block.linear.weight.t())

    def by_static(self, x: Tensor) -> Tensor:
        return Block.apply_weight(x, self.layers[0].linear.weight)  # type: ignore[union-attr,arg-type]

    @classmethod
    def by_class(cls, model: Any, x: Tensor) -> Any:
        return model.block(x) - x

    @property
    def weight_sum(self) -> Tensor:
        return self.block.linear.weight.sum()

    @property
    def head(self) -> Any:
        return self.named["head"]

    @torch.no_grad()
    def embed(self, x: Tensor) -> Any:
        return self.encode(x)

    @torch.inference_mode()
    def infer(self, x: Tensor) -> Any:
        return self.encode(x) @ self.raw

    def steps(self, x: Tensor) -> Any:
        for layer in self.layers:
            x = layer(x)
            yield x

    def remember(self, x: Tensor) -> Any:
        self.memory.append(self.block(x).detach())
        return sum(self.memory)

    def __getitem__(self, index: int) -> Any:
        return self.layers[index]

    def __len__(self) -> int:
        return len(self.layers)


def tell_of(weight: Any) -> Any:
    return (
        list(weight.shape), str(weight.dtype), str(weight.device), weight.dim(), weight.numel(), weight.nelement(),
        len(weight), weight.size(0), weight.stride(), weight.is_contiguous(), weight.element_size(), weight.layout,
        weight.is_floating_point(), weight.requires_grad, isinstance(weight, nn.Parameter),
        isinstance(weight, Tensor), weight.ndim, weight.itemsize, weight.nbytes, weight.is_sparse, weight.is_cuda,
    )  # fmt: skip


def read_weight(model: Any, x: Tensor) -> Any:
    weight = model.block.linear.weight
    return (
        tell_of(weight), weight.norm(), weight.data.sum(), weight.detach().abs().max(), weight.mean().item(),
        weight.clone(), weight + 1, 2 * weight, -weight, weight.tolist(), weight[0, 1], weight.unbind()[1],
        weight.view(-1), weight.flatten()[:3], torch.cat([weight, weight]), weight.double(), weight.T,
        weight.sort()[0],
        weight.to(torch.bfloat16), weight.square().sum(), torch.svd(weight)[1], weight.cpu(),
        weight.detach().numpy().tolist(),
    )  # fmt: skip


def users(model: Any) -> Any:
    return model.module if isinstance(model, ac.AdaptedModel) else model


CALLS: dict[str, Callable[..., Any]] = {
    "method": lambda m, x: m.encode(x),
    "method-with-keyword": lambda m, x: m.encode(x, times=2),
    "method-under-no-grad": lambda m, x: m.embed(x),
    "method-under-inference-mode": lambda m, x: m.infer(x),
    "functional-method": lambda m, x: m.project(x),
    "functional-method-transposed": lambda m, x: m.tied(x),
    "static-method": lambda m, x: m.by_static(x),
    "class-method": lambda m, x: m.by_class(m, x),
    "property": lambda m, x: m.weight_sum * 1.0,
    "property-module": lambda m, x: m.head(x),
    "generator": lambda m, x: list(m.steps(x)),
    "memory": lambda m, x: [m.remember(x), m.remember(x)],
    "submodule": lambda m, x: m.block(x),
    "submodule-of-submodule": lambda m, x: m.block.linear(x),
    "list": lambda m, x: m.layers[1](x),
    "dictionary": lambda m, x: m.named["head"](x),
    "sequence-item": lambda m, x: m.sequence[0](x),
    "sequence-slice": lambda m, x: m.sequence[:2](x),
    "get-submodule": lambda m, x: users(m).get_submodule("block")(x),
    "children": lambda m, x: [child(x) for child in m.sequence.children()],
    "modules": lambda m, x: [c(x) for c in m.modules() if isinstance(c, nn.Linear)],
    "forward-directly": lambda m, x: m.block.forward(x),
    "raw": lambda m, x: x @ m.raw,
    "weight-of-a-submodule": lambda m, x: F.linear(x, m.block.linear.weight),
    "weight-kept": lambda m, x: [F.linear(x, w) for w in [m.block.linear.weight, m.head.weight]],
    "getattr": lambda m, x: getattr(m, "block").linear(x),  # noqa: B009
    "vars": lambda m, x: F.linear(x, m.block.linear.weight) + len(m.layers),
    "reading": read_weight,
    "bound-method": lambda m, x: list(map(m.encode, [x, x * 2])),
    "train-inside": lambda m, x: [m.block.train()(x), m.block.eval()(x)],
}

TABLE = [
    *(
        Situation(
            name=name,
            build=Encoder,
            call=call,
            change=put("scale", 2.0),
            shows_in=(),
            is_folded="memory" not in name,
            runs=WITH_EXAMPLE,
        )
        for name, call in CALLS.items()
    ),
    Situation(
        name="sequence-called-by-index",
        build=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)),
        call=lambda m, x: users(m)[2](x),
    ),
    Situation(name="index-of-a-model", build=Encoder, call=lambda m, x: users(m)[1](x)),
]


@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_methods(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


@pytest.mark.parametrize("name", CALLS)
def test_the_same_on_the_module(name: str) -> None:
    seed(1)
    model, x = Encoder().eval(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    seed(2)
    expected = CALLS[name](Oracle(adapted, model).model, x)
    seed(2)
    assert_close(CALLS[name](adapted.module, x), expected)
