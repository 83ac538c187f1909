"""Gradients of plain formulas, for the backward of custom ``autograd.Function`` classes.

The handwritten backward of such a function cannot be differentiated, and does not support batched gradients. Where
either is needed, backward takes the gradient of the plain formula by autograd instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from passes import compat


def is_plain_needed(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether a backward must be differentiable itself, or gets batched gradients."""
    return torch.is_grad_enabled() or any(map(is_batched, gradients))


def is_batched(tensor: torch.Tensor) -> bool:
    """Whether a tensor is batched by ``torch.vmap`` or ``is_grads_batched=True``; never in compiled code."""
    return not torch.compiler.is_compiling() and compat.is_batched(tensor)


def differentiate(
    run: Callable[..., Sequence[torch.Tensor]],
    operands: Sequence[torch.Tensor | None],
    needed: Sequence[bool],
    gradients: Sequence[torch.Tensor],
) -> list[torch.Tensor | None]:
    """Gradients of ``run(*operands)``; they can be differentiated again if gradients are enabled.

    Operands count as independent of each other, also where one was computed from another (one weight used twice in a
    row).

    Args:
        run: the formula.
        operands: its arguments; some may be ``None``.
        needed: which of them need a gradient.
        gradients: the gradients of the tensors that ``run`` returns.

    Returns:
        A gradient for each operand, ``None`` where none is needed.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        own = [_alias(o, create_graph) if o is not None and n else o for o, n in zip(operands, needed, strict=True)]
        wanted = [o for o, n in zip(own, needed, strict=True) if o is not None and n]
        found = iter(torch.autograd.grad(run(*own), wanted, gradients, create_graph=create_graph, allow_unused=True))
    return [next(found) if o is not None and n else None for o, n in zip(own, needed, strict=True)]


def _alias(operand: torch.Tensor, create_graph: bool) -> torch.Tensor:
    """A new tensor with the operand's values, which keeps its autograd history only if ``create_graph``."""
    if create_graph and operand.requires_grad:
        return operand.view_as(operand)
    return operand.detach().requires_grad_()
