"""The fused functions against their formula: gradients and second derivatives in float64, every dtype forward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from passes.fused_ops import fused_linears, fused_update

SCALES = (0.5, 2.0)


def draw(*shape: int, grad: bool = True) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=grad)


def linears(x: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
    """Two sites: a bias and none, other widths, other ranks."""
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
def seed() -> None:
    torch.manual_seed(0)


def update(y: Tensor, x: Tensor, P: Tensor, lam: Tensor, Q: Tensor) -> Tensor:
    return fused_update(y, x, P, lam, Q, 0.5)


def draw_update() -> tuple[Tensor, ...]:
    return draw(2, 4, 5), draw(2, 4, 3), draw(5, 2), draw(2), draw(2, 3)


CASES = [(linears, draw_operands), (update, draw_update)]


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
