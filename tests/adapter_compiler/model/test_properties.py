"""Insert ≡ identity and fold ≡ unfolded, over shapes, ranks, dtypes, orientation, bias and sharing."""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import adapter_compiler as ac

DTYPES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 6e-2}
WAYS = ("linear", "matmul", "addmm", "transposed", "weight")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """A small model: the kinds and widths of its layers, and the options of its adapters."""

    widths: tuple[int, ...]
    ways: tuple[str, ...]
    bias: bool
    shared: bool
    dtype: torch.dtype
    rank: int
    batch: int


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    depth = draw(st.integers(1, 3))
    return Recipe(
        widths=tuple(draw(st.lists(st.integers(1, 9), min_size=depth + 1, max_size=depth + 1))),
        ways=tuple(draw(st.lists(st.sampled_from(WAYS), min_size=depth, max_size=depth))),
        bias=draw(st.booleans()),
        shared=draw(st.booleans()),
        dtype=draw(st.sampled_from(sorted(DTYPES, key=str))),
        rank=draw(st.integers(1, 12)),
        batch=draw(st.integers(1, 5)),
    )


class Layer(nn.Module):
    """One product, written in one of several ways, without a nonlinear function after it."""

    def __init__(self, way: str, fan_in: int, fan_out: int, bias: bool) -> None:
        super().__init__()
        self.way = way
        shape = (fan_in, fan_out) if way in ("matmul", "addmm") else (fan_out, fan_in)
        self.weight = nn.Parameter(torch.randn(shape) / fan_in**0.5)
        self.bias = nn.Parameter(torch.randn(fan_out)) if bias or way == "addmm" else None

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "addmm":
            assert self.bias is not None
            return torch.addmm(self.bias, x, self.weight)
        if self.way == "linear":
            return F.linear(x, self.weight, self.bias)
        if self.way == "matmul":
            y = x @ self.weight
        elif self.way == "transposed":
            y = x @ self.weight.mT
        else:
            y = torch.cat([F.linear(x, self.weight[:1]), F.linear(x, self.weight[1:])], -1)
        return y if self.bias is None else y + self.bias


class Model(nn.Module):
    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        pairs = zip(recipe.ways, recipe.widths, recipe.widths[1:], strict=False)
        self.layers = nn.ModuleList([Layer(way, a, b, recipe.bias) for way, a, b in pairs])
        self.loop = Layer(recipe.ways[0], recipe.widths[-1], recipe.widths[-1], recipe.bias) if recipe.shared else None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        if self.loop is not None:
            x = self.loop(torch.tanh(self.loop(x)))
        return x


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.too_slow])
@given(recipe=recipes())
def test_insert_is_identity_and_fold_is_the_adapted_model(recipe: Recipe) -> None:
    torch.manual_seed(0)
    model = Model(recipe).to(recipe.dtype).eval()
    x = torch.randn(recipe.batch, recipe.widths[0], dtype=recipe.dtype)
    adapted = ac.compile_with_adapters(model, (x,), config=ac.AdapterConfig(rank=recipe.rank, alpha=recipe.rank))
    assert len(adapted.sites) == len(recipe.ways) + recipe.shared
    with torch.no_grad():
        plain = model(x)
        assert torch.equal(adapted(x), plain)
        torch.testing.assert_close(adapted.fold().state_dict(), model.state_dict(), rtol=0, atol=0)

        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
        expected, merged = adapted(x), adapted.fold()
        scale = max(1.0, float(expected.abs().max()))
        torch.testing.assert_close(merged(x), expected, rtol=0, atol=DTYPES[recipe.dtype] * scale)
        torch.testing.assert_close(model(x), plain, rtol=0, atol=0)
    assert list(merged.state_dict()) == list(model.state_dict())
    assert {value.dtype for value in merged.state_dict().values()} == {recipe.dtype}
