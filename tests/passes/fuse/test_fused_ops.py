"""The fused functions against their formula: gradients and second derivatives in float64, outputs in every dtype."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.fuse.fused_ops import fused_linears, fused_update

aten = torch.ops.aten

SCALES = (0.5, 2.0)


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def linears(x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """Two sites: one with a bias, one without; different widths and ranks."""
    W1, b1, W2, P1, l1, Q1, P2, l2, Q2 = operands
    return fused_linears(x, SCALES, W1, b1, P1, l1, Q1, W2, None, P2, l2, Q2)


def formula(x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    W1, b1, W2, P1, l1, Q1, P2, l2, Q2 = operands
    first = F.linear(x, W1, b1) + SCALES[0] * F.linear(F.linear(x, Q1) * l1, P1)
    return first, F.linear(x, W2) + SCALES[1] * F.linear(F.linear(x, Q2) * l2, P2)


def draw_operands() -> tuple[Tensor, ...]:
    frozen = (draw(5, 3, grad=False), draw(5, grad=False), draw(4, 3, grad=False))
    return (draw(2, 4, 3), *frozen, draw(5, 2), draw(2), draw(2, 3), draw(4, 1), draw(1), draw(1, 3))


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    monkeypatch.setattr("passes.fuse.fused_ops._SMALL", 0)
    monkeypatch.setattr("passes.fuse.fused_ops._FEW_ROWS", 0)


def update(y: Tensor, x: Tensor, P: Tensor, lam: Tensor, Q: Tensor) -> Tensor:
    return fused_update(y, x, P, lam, Q, 0.5)


def draw_update() -> tuple[Tensor, ...]:
    return draw(2, 4, 5), draw(2, 4, 3), draw(5, 2), draw(2), draw(2, 3)


def mixed(x: Tensor, W: Tensor, P1: Tensor, lam: Tensor, Q1: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    """A site with λ and a site without, as in LoRA."""
    return fused_linears(x, SCALES, W, None, P1, lam, Q1, W, None, B, None, A)


def mixed_formula(x: Tensor, W: Tensor, P: Tensor, lam: Tensor, Q: Tensor, B: Tensor, A: Tensor) -> tuple[Tensor, ...]:
    first = F.linear(x, W) + SCALES[0] * F.linear(F.linear(x, Q) * lam, P)
    return first, F.linear(x, W) + SCALES[1] * F.linear(F.linear(x, A), B)


def draw_mixed() -> tuple[Tensor, ...]:
    return draw(2, 4, 3), draw(5, 3, grad=False), draw(5, 2), draw(2), draw(2, 3), draw(5, 1), draw(1, 3)


def lora_update(y: Tensor, x: Tensor, B: Tensor, A: Tensor) -> Tensor:
    return fused_update(y, x, B, None, A, 0.5)


def draw_lora_update() -> tuple[Tensor, ...]:
    return draw(2, 4, 5), draw(2, 4, 3), draw(5, 2), draw(2, 3)


CASES = [(linears, draw_operands), (update, draw_update), (mixed, draw_mixed), (lora_update, draw_lora_update)]


def test_without_lambda_it_is_the_formula_of_lora() -> None:
    operands = draw_mixed()
    torch.testing.assert_close(mixed(*operands), mixed_formula(*operands))
    y, x, B, A = draw_lora_update()
    torch.testing.assert_close(lora_update(y, x, B, A), y + 0.5 * F.linear(F.linear(x, A), B))


@pytest.mark.parametrize(("fused", "operands"), CASES)
def test_gradients(fused: Callable[..., Tensor], operands: Callable[[], tuple[Tensor, ...]]) -> None:
    assert torch.autograd.gradcheck(fused, operands())


@pytest.mark.parametrize(("fused", "operands"), CASES)
def test_second_derivatives(fused: Callable[..., Tensor], operands: Callable[[], tuple[Tensor, ...]]) -> None:
    assert torch.autograd.gradgradcheck(fused, operands())


def test_frozen_input_gets_no_gradient() -> None:
    x, *operands = draw_operands()
    outputs = linears(x.detach(), *operands)
    sum(output.sum() for output in outputs).backward()  # type: ignore[union-attr]
    assert all(operand.grad is not None for operand in operands if operand.requires_grad)


def test_outputs_follow_the_formula() -> None:
    operands = draw_operands()
    torch.testing.assert_close(linears(*operands), formula(*operands))
    y, x, P, lam, Q = draw_update()
    torch.testing.assert_close(update(y, x, P, lam, Q), y + 0.5 * F.linear(F.linear(x, Q) * lam, P))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_with_wider_adapters(dtype: torch.dtype) -> None:
    x, W1, b1, W2, *adapters = draw_operands()
    base = [t.detach().to(dtype) for t in (x, W1, b1, W2)]
    wide = [t.detach().float().requires_grad_() for t in adapters]
    found = linears(*base, *wide)
    expected = formula(*(t.float() for t in base), *wide)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.float(), theirs, rtol=2e-2, atol=5e-2)
    gradients = torch.autograd.grad([f.float().sum() for f in found], wide)
    wanted = torch.autograd.grad([e.sum() for e in expected], wide)
    for mine, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=5e-2)


def make(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype).requires_grad_()


def make_site(out: int, fan_in: int, rank: int, *, bias: bool = True, dtype: torch.dtype = torch.float64) -> list[Any]:
    b = make(out, dtype=dtype) if bias else None
    return [
        make(out, fan_in, dtype=dtype),
        b,
        make(out, rank, dtype=dtype),
        make(rank, dtype=dtype),
        make(rank, fan_in, dtype=dtype),
    ]


def plain_formula(x: Tensor, scales: tuple[float, ...], *operands: Any) -> tuple[Tensor, ...]:
    linear = torch.nn.functional.linear
    sites = [operands[i : i + 5] for i in range(0, len(operands), 5)]
    return tuple(
        linear(x, W, b) + linear(linear(x, Q) * (lam * s), P)
        for s, (W, b, P, lam, Q) in zip(scales, sites, strict=True)
    )


SHAPES = [(5,), (4, 5), (2, 3, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("bias", [True, False])
def test_linears_have_the_gradients_of_finite_differences(shape: tuple[int, ...], bias: bool) -> None:
    operands = make_site(4, 5, 2, bias=bias) + make_site(6, 5, 3)
    assert torch.autograd.gradcheck(lambda x, *o: fused_linears(x, (0.5, 0.7), *o), (make(*shape), *operands))


@pytest.mark.parametrize("shape", SHAPES)
def test_update_has_the_gradients_of_finite_differences(shape: tuple[int, ...]) -> None:
    _, _, P, lam, Q = make_site(4, 5, 2)
    inputs = (make(*shape[:-1], 4), make(*shape), P, lam, Q)
    assert torch.autograd.gradcheck(lambda y, x, P, lam, Q: fused_update(y, x, P, lam, Q, 0.3), inputs)


@pytest.mark.parametrize("ranks", [(1,), (12,), (3, 5), (2, 1, 4), (0, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linears_equal_the_plain_formula(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    operands = list(itertools.chain.from_iterable(make_site(7 + i, 16, r, dtype=dtype) for i, r in enumerate(ranks)))
    scales = tuple(0.5 + i for i in range(len(ranks)))
    x = make(3, 4, 16, dtype=dtype)
    inputs = [tensor for tensor in (x, *operands) if tensor is not None]
    found, expected = fused_linears(x, scales, *operands), plain_formula(x, scales, *operands)
    torch.testing.assert_close(found, expected)
    seeds = [torch.randn_like(y) for y in expected]
    torch.testing.assert_close(torch.autograd.grad(found, inputs, seeds), torch.autograd.grad(expected, inputs, seeds))


@pytest.mark.parametrize("operator", ["gelu", "layer_norm"])
def test_recomputing_x_gives_identical_results(operator: str) -> None:
    h, scale, shift = make(6, 16), make(16), make(16)
    operands = make_site(7, 16, 3)
    recipe: Any = (
        (aten.gelu.default, (h,), {}, None)
        if operator == "gelu"
        else (aten.layer_norm.default, (h, [16], scale, shift, 1e-5), {}, (6, 16))
    )
    found = []
    for use in (None, recipe):
        x = recipe[0](*recipe[1])
        (y,) = fused_linears(x, (0.5,), *operands, recomputation=use)
        inputs = [h, *operands]
        found.append((y, *torch.autograd.grad(y.square().sum(), inputs)))
    for kept, recomputed in zip(*found, strict=True):
        assert torch.equal(kept, recomputed)


def test_zero_lambda_is_the_base_layer_bit_for_bit() -> None:
    W, b, P, lam, Q = make_site(9, 16, 3, dtype=torch.float32)
    x = make(5, 16, dtype=torch.float32)
    (y,) = fused_linears(x, (0.5,), W, b, P, torch.zeros_like(lam), Q)
    assert torch.equal(y, torch.nn.functional.linear(x, W, b))


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_half_precision_base_with_wide_adapters(narrow: torch.dtype) -> None:
    """The update is computed in the adapters' float32 and rounded once."""
    W, b, P, lam, Q = make_site(9, 16, 3, dtype=torch.float32)
    W, b = (tensor.detach().to(narrow).requires_grad_() for tensor in (W, b))
    x = make(5, 16, dtype=torch.float32).detach().to(narrow).requires_grad_()
    (y,) = fused_linears(x, (0.5,), W, b, P, lam, Q)
    exact = [t.detach().double().requires_grad_() for t in (x, W, b, P, lam, Q)]
    (expected,) = plain_formula(exact[0], (0.5,), *exact[1:])
    assert y.dtype == narrow
    torch.testing.assert_close(y.double(), expected, rtol=0.03, atol=0.05)
    gradients = torch.autograd.grad(y.float().sum(), (x, W, b, P, lam, Q))
    assert [g.dtype for g in gradients] == [narrow, narrow, narrow] + [torch.float32] * 3
    reference = torch.autograd.grad(expected.sum(), exact)
    for found, right in zip(gradients, reference, strict=True):
        torch.testing.assert_close(found.double(), right, rtol=0.03, atol=0.1)


@pytest.mark.parametrize("recompute", [False, True])
def test_autocast_applies_to_adapters_as_to_the_base(recompute: bool) -> None:
    operands = make_site(9, 16, 3, dtype=torch.float32)
    h = make(5, 16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        x = aten.gelu.default(h)
        recomputation: Any = (aten.gelu.default, (h,), {}, None) if recompute else None
        (y,) = fused_linears(x, (0.5,), *operands, recomputation=recomputation)
        (expected,) = plain_formula(x, (0.5,), *operands)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.03, atol=0.1)
    found = torch.autograd.grad(y.float().sum(), (h, *operands), retain_graph=True)
    reference = torch.autograd.grad(expected.float().sum(), (h, *operands))
    for one, other in zip(found, reference, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.3)


def test_second_derivatives_where_x_is_recomputed() -> None:
    operands = make_site(4, 5, 2)

    def run(h: Tensor, *operands: Tensor) -> Tensor:
        (y,) = fused_linears(aten.gelu.default(h), (0.5,), *operands, recomputation=(aten.gelu.default, (h,), {}, None))
        return y

    assert torch.autograd.gradgradcheck(run, (make(3, 5), *operands))


@pytest.mark.parametrize("shape", [(16,), (5, 16), (2, 3, 16)])
def test_few_rows_give_the_same_with_torchs_operators(shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    operands = [*make_site(9, 16, 3), *make_site(4, 16, 2)]
    x = make(*shape)
    found = []
    for few in (0, 64):
        monkeypatch.setattr("passes.fuse.fused_ops._FEW_ROWS", few)
        outputs = fused_linears(x, SCALES, *operands)
        found.append(
            [*outputs, *torch.autograd.grad(torch.stack([y.square().sum() for y in outputs]).sum(), [x, *operands])]
        )
    assert [y.shape for y in found[1][:2]] == [(*shape[:-1], 9), (*shape[:-1], 4)]
    torch.testing.assert_close(found[1], found[0])


def test_zero_lambda_with_few_rows_is_the_base_layer_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.fuse.fused_ops._FEW_ROWS", 64)
    W, b, P, lam, Q = make_site(9, 16, 3, dtype=torch.float32)
    x = make(5, 16, dtype=torch.float32)
    (y,) = fused_linears(x, (0.5,), W, b, P, torch.zeros_like(lam), Q)
    assert torch.equal(y, torch.nn.functional.linear(x, W, b))
    y.add_(1)  # the output is not a view, for which autograd would refuse this
