"""Gradients of plain formulas inside the backward of a function of our own.

A backward that has formulas of its own is not differentiable, and does not compute many gradients at once. Where either
is asked for, it takes the gradient of the plain formula instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def is_plain_needed(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether a backward must be differentiable itself, or gets many gradients at once."""
    return torch.is_grad_enabled() or any(map(is_batched, gradients))


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether many tensors are computed with at once, as by ``torch.vmap`` and ``is_grads_batched=True``."""
    if torch.compiler.is_compiling():
        return False
    of = torch._C._functorch
    return of.is_batchedtensor(tensor) or of.is_legacy_batchedtensor(tensor)


def differentiate(
    run: Callable[..., Sequence[torch.Tensor]],
    operands: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients of ``run(*operands)``, differentiable again where gradients are switched on.

    Each is that of ``run`` alone: operands that depend on each other, as where one weight is used twice in a row, are
    taken as independent.

    Args:
        run: the formula.
        operands: its arguments; some may be ``None``.
        needed: which of them need a gradient.
        gradients: of what ``run`` returns.

    Returns:
        A gradient for each operand, ``None`` where none is needed.
    """
    is_again = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [_alias(o, is_again) if o is not None and n else o for o, n in zip(operands, needed, strict=True)]
        wanted = [o for o, n in zip(own, needed, strict=True) if o is not None and n]
        found = iter(torch.autograd.grad(run(*own), wanted, gradients, create_graph=is_again, allow_unused=True))
    return [next(found) if o is not None and n else None for o, n in zip(own, needed, strict=True)]


def _alias(operand: torch.Tensor, is_again: bool) -> torch.Tensor:
    """The operand as one of its own; connected with its history where the gradient is to be differentiated again."""
    if is_again and operand.requires_grad:
        return operand.view_as(operand)
    return operand.detach().requires_grad_()
