"""A packed weight gives the same results as its dequantized values, and autograd saves only its code."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.capture.calls import split_call
from passes.capture.capture import MODULE_PREFIX, capture_call
from passes.quantize.packed_weights import (
    PackedValues,
    PackedWeight,
    count_bytes,
    find_packed_weights,
    moved_weights,
    pack_parameter,
    set_parameter,
    weights_without_storage,
)


@dataclasses.dataclass(frozen=True)
class RoundedValues(PackedValues):
    """Values rounded to multiples of 1/16, one byte each."""

    codes: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32

    def unpack(self) -> Tensor:
        return self.codes.float() / 16

    def tensors(self) -> Mapping[str, Tensor]:
        return {"codes": self.codes}

    def to(self, device: torch.device) -> RoundedValues:
        return RoundedValues(self.codes.to(device))


class Rounding:
    name = "rounding"

    def pack(self, weight: Tensor) -> RoundedValues:
        return RoundedValues((weight.float() * 16).round().clamp(-128, 127).to(torch.int8))


@pytest.fixture
def weight() -> nn.Parameter:
    torch.manual_seed(0)
    return nn.Parameter(torch.randn(6, 4))


@pytest.fixture
def packed(weight: nn.Parameter) -> nn.Parameter:
    return pack_parameter(weight, Rounding())


def dense_of(packed: Tensor) -> Tensor:
    assert isinstance(packed, PackedWeight)
    return packed.unpack()


def test_it_has_the_attributes_of_the_weight_and_less_memory(weight: nn.Parameter, packed: nn.Parameter) -> None:
    assert isinstance(packed, PackedWeight)
    assert isinstance(packed, nn.Parameter)
    assert (packed.shape, packed.dtype, packed.device) == (weight.shape, weight.dtype, weight.device)
    assert not packed.requires_grad
    assert packed.is_floating_point()
    assert (count_bytes(weight), count_bytes(packed)) == (96, 24)
    assert float((dense_of(packed) - weight.detach()).abs().max()) <= 1 / 32 + 1e-6
    assert repr(packed) == "PackedWeight(RoundedValues, shape=(6, 4), dtype=torch.float32)"


X = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "compute",
    [
        lambda x, w: F.linear(x, w),
        lambda x, w: F.linear(x, w, torch.ones(6)),
        lambda x, w: F.linear(x.transpose(0, 1), w),
        lambda x, w: x @ w.t(),
        lambda x, w: x @ w.mT,
        lambda x, w: x @ w.permute(1, 0),
        lambda x, w: torch.einsum("bsi,oi->bso", x, w),
        lambda x, w: F.embedding(torch.tensor([1, 3]), w) * x.sum(),
        lambda x, w: F.linear(x, w[2:5]),
        lambda x, w: F.linear(x, (w * 2 + 1).tanh()),
        lambda x, w: F.linear(x.double(), w.double()),
        lambda x, w: torch.addmm(torch.ones(6), x[0], w.t()),
        lambda x, w: x.sum() * w.norm(dim=1),
    ],
)
def test_operators_give_the_same_as_for_the_dequantized_values(packed: nn.Parameter, compute: Any) -> None:
    results = []
    for w in (packed, dense_of(packed)):
        x = X.clone().requires_grad_()
        y = compute(x, w)
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        results.append((y, gradient))
    assert type(results[0][0]) is Tensor
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("x", [X[0], X], ids=["2-D", "3-D"])
def test_autograd_saves_only_the_code(packed: nn.Parameter, x: Tensor, autocast: bool) -> None:
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    x = x.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t), torch.autocast("cpu", enabled=autocast):
        y = F.linear(x, packed)
    assert y.dtype == (torch.bfloat16 if autocast else torch.float32)
    assert [type(tensor) for tensor in kept] == [PackedWeight]
    y.sum().backward()
    dense = dense_of(packed).sum(0).expand_as(x)
    torch.testing.assert_close(x.grad, dense, rtol=2e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)


def test_transposes_and_casts_stay_packed(packed: nn.Parameter) -> None:
    dense = dense_of(packed)
    for found, expected in (
        (packed.t(), dense.t()),
        (packed.transpose(-1, 0), dense.t()),
        (packed.t().t(), dense),
        (packed.detach(), dense),
        (packed.to(torch.bfloat16), dense.bfloat16()),
        (packed.t().double(), dense.t().double()),
    ):
        assert isinstance(found, PackedWeight)
        assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
        assert torch.equal(found.unpack(), expected)
    for plain in (packed.clone(), packed.to(torch.int32), packed + 0, packed.transpose(1, -1)):
        assert type(plain) is Tensor
    assert torch.equal(packed.transpose(1, -1), dense)


def test_copies_and_pickles_have_their_own_code(packed: nn.Parameter) -> None:
    buffer = io.BytesIO()
    torch.save({"w": packed, "t": packed.t()}, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    for other in (copy.deepcopy(packed), loaded["w"], loaded["t"].t()):
        assert isinstance(other, PackedWeight)
        assert torch.equal(other.unpack(), dense_of(packed))
    mine, theirs = (cast("PackedWeight", w).packed.tensors()["codes"] for w in (packed, copy.deepcopy(packed)))
    assert mine.data_ptr() != theirs.data_ptr()
    assert isinstance(loaded["w"], nn.Parameter)


def test_a_state_dict_loads_only_packed_weights(packed: nn.Parameter) -> None:
    layers = [nn.Linear(4, 6, bias=False) for _ in range(2)]
    set_parameter(layers[0], "weight", packed)
    set_parameter(layers[1], "weight", pack_parameter(layers[1].get_parameter("weight"), Rounding()))
    layers[1].load_state_dict(layers[0].state_dict())
    assert torch.equal(dense_of(layers[1].weight), dense_of(packed))
    with pytest.raises(
        RuntimeError, match=r"values cannot be written into a quantized weight: found plain torch\.float32"
    ):
        layers[1].load_state_dict({"weight": torch.zeros(6, 4)})


def test_packed_weights_are_removed_and_put_back(packed: nn.Parameter) -> None:
    layer = nn.Linear(4, 6)
    set_parameter(layer, "weight", packed)
    assert find_packed_weights(layer) == {"weight": packed}
    with weights_without_storage(layer):
        assert type(layer.weight) is nn.Parameter
        assert (layer.weight.shape, layer.weight.untyped_storage().size()) == ((6, 4), 0)
    assert layer.weight is packed
    with moved_weights(layer, lambda t: t.to(torch.float64)):
        assert layer.weight is None
        layer.double()
    assert isinstance(layer.weight, PackedWeight) and layer.weight.dtype == torch.float64
    with pytest.raises(ZeroDivisionError), moved_weights(layer, lambda t: t):
        _ = 1 / 0
    assert isinstance(layer.weight, PackedWeight)


def test_a_module_with_packed_weights_is_captured(packed: nn.Parameter) -> None:
    layer = nn.Linear(4, 6)
    set_parameter(layer, "weight", packed)
    captured = capture_call(layer, split_call((X,), {}))
    assert captured.graph_module.get_parameter(f"{MODULE_PREFIX}weight") is packed
    assert captured.largest_error == 0
    (y,) = captured.graph_module(X[:1].repeat(5, 1, 1))
    torch.testing.assert_close(y, F.linear(X[:1].repeat(5, 1, 1), dense_of(packed), layer.bias))
