"""Group optimizer steps into rounds: in each round, every optimizer of a budget steps once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from adapter_compiler.training.budget.stepping.closures import StepArguments, call_after_closure


class StepRounds:
    """Hooks on several optimizers that act like hooks on one.

    A round begins before the first step of an optimizer and ends when all have stepped. If one of them is skipped (by a
    GradScaler), the round ends when another optimizer begins its next step.
    """

    def __init__(
        self,
        chains: Sequence[Sequence[torch.optim.Optimizer]],
        *,
        begin: Callable[[], None],
        take: Callable[[float | None], None],
        end: Callable[[], None],
    ) -> None:
        """Register the hooks.

        Args:
            chains: each optimizer, followed by the optimizers that wrap it.
            begin: called before the first step of a round.
            take: called before a step, when its gradients exist; with a closure, after each evaluation of it. It gets
                the scale of the gradients if a fused optimizer unscales them itself, else ``None``.
            end: called after the last step of a round.
        """
        self._chains = {id(chain[0]): chain for chain in chains}
        self._begin, self._take, self._end = begin, take, end
        self._stepped: set[int] = set()
        self._gradients: dict[int, torch.Tensor | None] = {}
        self._skipped: set[int] = set()
        self._handles: list[RemovableHandle] = []
        for inner, *_ in chains:
            self._handles.append(inner.register_step_pre_hook(self._before))
            self._handles.append(inner.register_step_post_hook(self._after))

    def detach(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> StepArguments | None:
        # A GradScaler passes the scale and whether to skip to a fused optimizer, which unscales inside its step.
        chain = self._chains[id(optimizer)]
        found_inf, scale = _find_attribute(chain, "found_inf"), _find_attribute(chain, "grad_scale")
        if found_inf is not None and bool(found_inf):
            self._skipped.add(id(optimizer))
            return None
        if self._stepped and self._is_next_round(optimizer):
            self._finish()
        is_first = not self._stepped
        if is_first:
            self._begin()
        grad_scale = None if found_inf is None or scale is None else float(scale)
        with_closure = call_after_closure(args, kwargs, lambda: self._take(grad_scale))
        if with_closure is None and is_first:
            self._take(grad_scale)
        if is_first:
            self._gradients = {key: _find_gradient(chain[0]) for key, chain in self._chains.items()}
        return with_closure

    def _after(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if id(optimizer) in self._skipped:
            self._skipped.discard(id(optimizer))
            return
        self._stepped.add(id(optimizer))
        if self._stepped == self._chains.keys():
            self._finish()

    def _finish(self) -> None:
        self._stepped, self._gradients = set(), {}
        self._end()

    def _is_next_round(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer begins the next round: it has stepped in this one, or its gradients are new."""
        if id(optimizer) in self._stepped:
            return True
        gradient = _find_gradient(optimizer)
        return gradient is not None and gradient is not self._gradients.get(id(optimizer), gradient)


def _find_attribute(chain: Sequence[torch.optim.Optimizer], name: str) -> Any:
    found = (getattr(optimizer, name, None) for optimizer in chain)
    return next((value for value in found if value is not None), None)


def _find_gradient(optimizer: torch.optim.Optimizer) -> torch.Tensor | None:
    parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return next((parameter.grad for parameter in parameters if parameter.grad is not None), None)
