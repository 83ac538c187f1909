"""Memory-efficient operators against torch's: outputs, gradients, draws, second derivatives, saved memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from passes.fuse.memory_efficient_ops import memory_efficient_attention, memory_efficient_dropout

aten = torch.ops.aten


def run(function: Any, tensors: list[Tensor], *args: Any, **kwargs: Any) -> tuple[list[Tensor], Tensor]:
    """Output and gradients under a fixed random state, and the random state afterwards."""
    own = [t.detach().clone().requires_grad_() for t in tensors]
    torch.manual_seed(7)
    output = function(*own, *args, **kwargs)
    weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    (output * weights).sum().backward()
    return [output.detach(), *(t.grad for t in own if t.grad is not None)], torch.get_rng_state()


def assert_equal(found: Any, expected: Any, *, exactly: bool = False) -> None:
    for one, other in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0 if exactly else 1e-5, atol=0 if exactly else 1e-6)
    assert torch.equal(found[1], expected[1])


def make_heads(*, dtype: torch.dtype = torch.float32, keys: int = 7) -> list[Tensor]:
    """q, k and v [B, H, ., E], transposed from [B, ., H, E] as in models."""
    torch.manual_seed(0)
    shapes = ((2, 5, 3, 4), (2, keys, 3, 4), (2, keys, 3, 6))
    return [torch.randn(shape, dtype=dtype).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.9, 1.0])
def test_dropout_equals_torchs_bit_for_bit(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(3, 11, 1024, dtype=dtype)
    assert_equal(run(memory_efficient_dropout, [x], p, True), run(aten.dropout.default, [x], p, True), exactly=True)
    strided = torch.randn(1024, 33, dtype=dtype).t()
    assert_equal(
        run(memory_efficient_dropout, [strided], p, True), run(aten.dropout.default, [strided], p, True), exactly=True
    )


MASKS = {
    "none": None,
    "padding": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0, 0]]).bool()[:, None, None],
    "fully masked rows": torch.tensor([[1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]]).bool()[:, None, None],
    "two dimensions": torch.ones(5, 7).tril().bool(),
    "numbers": torch.linspace(-2, 2, 35).view(1, 1, 5, 7),
    "numbers with -inf": torch.full((5, 7), -torch.inf).triu(1),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_attention_equals_torchs(mask: str, scale: float | None) -> None:
    heads = make_heads()
    found = run(memory_efficient_attention, heads, MASKS[mask], 0.3, scale=scale)
    assert_equal(found, run(aten.scaled_dot_product_attention.default, heads, MASKS[mask], 0.3, scale=scale))


def test_causal_attention_equals_torchs() -> None:
    heads = make_heads(keys=5)
    found = run(memory_efficient_attention, heads, None, 0.3, True)
    assert_equal(found, run(aten.scaled_dot_product_attention.default, heads, None, 0.3, True))


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_attention_with_some_gradients(wanted: tuple[int, ...]) -> None:
    found = []
    for function in (memory_efficient_attention, aten.scaled_dot_product_attention.default):
        heads = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(make_heads())]
        torch.manual_seed(1)
        function(heads[0], heads[1], heads[2], None, 0.2).square().sum().backward()
        found.append([t.grad for t in heads])
    for one, other in zip(*found, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


def test_other_cases_run_torchs_operators() -> None:
    heads = make_heads()
    plain = aten.scaled_dot_product_attention.default
    trained = torch.zeros(5, 7, requires_grad=True)
    found = run(memory_efficient_attention, heads, trained, 0.3)
    assert trained.grad is not None
    assert_equal(found, run(plain, heads, trained, 0.3))
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(run(memory_efficient_attention, heads, None, 0.3), run(plain, heads, None, 0.3), exactly=True)
    grouped = [torch.randn(2, 4, 5, 4), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4)]
    found = run(memory_efficient_attention, grouped, None, 0.3, enable_gqa=True)
    assert_equal(found, run(plain, grouped, None, 0.3, enable_gqa=True))


def seeded(function: Any, *args: Any, **kwargs: Any) -> Any:
    def call(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        output: Tensor = function(*tensors, *args, **kwargs)
        return output

    return call


def test_first_and_second_derivatives(monkeypatch: pytest.MonkeyPatch) -> None:
    heads = [t[:1, :1].contiguous().requires_grad_() for t in make_heads(dtype=torch.float64, keys=3)]
    mask = torch.ones(5, 3).tril().bool()
    assert torch.autograd.gradcheck(seeded(memory_efficient_attention, mask, 0.4), heads)
    assert torch.autograd.gradgradcheck(seeded(memory_efficient_attention, mask, 0.4), heads)
    monkeypatch.setattr("passes.fuse.memory_efficient_ops._SMALL", 0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(seeded(memory_efficient_dropout, 0.4, True), [x])
    assert torch.autograd.gradgradcheck(seeded(memory_efficient_dropout, 0.4, True), [x])


def measure_kept(function: Any, tensors: list[Tensor], *args: Any) -> int:
    """Bytes of all storages that autograd saves, those of the arguments included."""
    storages = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*(t.requires_grad_() for t in tensors), *args)
    assert output.requires_grad
    return sum(storages.values())


def test_less_memory_is_saved_for_backward() -> None:
    heads = [torch.randn(4, 2, 32, 8) for _ in range(3)]
    ours = measure_kept(memory_efficient_attention, heads, None, 0.1)
    assert ours < 0.6 * measure_kept(aten.scaled_dot_product_attention.default, heads, None, 0.1)
    x = [torch.randn(256, 256)]
    assert measure_kept(memory_efficient_dropout, x, 0.1, True) < 0.3 * measure_kept(aten.dropout.default, x, 0.1, True)
