"""Gradients with inf or nan: an error before the step, and on an accelerator without waiting for the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import nn

from adapter_compiler.adapters.parameters.sharded import gather_full
from adapter_compiler.errors import NonFiniteGradientError
from adapter_compiler.training.scoring.triplet_buffers import TripletBuffers

_LETTERS = {"lam": "λ", "P": "P", "Q": "Q"}

#: After how many steps a device is asked at the latest whether it has seen inf or nan.
_PATIENCE = 100


class FiniteGradients:
    """Checks the gradients of each step.

    Where the gradients are in the host's memory, an error is raised before the step, which then changes nothing. To
    know as much of a gradient on an accelerator, each step would have to wait for the device. So the device notes the
    first step with inf or nan itself, and :meth:`ask` reads the note: at each masking, before a state is saved, and
    after 100 steps at the latest.
    """

    def __init__(self, model: nn.Module) -> None:
        """Check nothing yet.

        Args:
            model: where parameters have names.
        """
        self._model = model
        self._first: torch.Tensor | None = None
        self._unasked = 0

    def check(
        self,
        triplets: TripletBuffers,
        gradients: Sequence[torch.Tensor],
        step: int,
        others: Sequence[torch.Tensor] = (),
    ) -> None:
        """Check the gradients of one step, or let the device check them.

        Args:
            triplets: the triplets.
            gradients: their gradients.
            step: the number of the step, from 1.
            others: other parameters, such as those of a head that is trained fully.

        Raises:
            NonFiniteGradientError: a gradient in the host's memory has inf or nan, or one on a device had it in an
                earlier step.
        """
        total = _sum_all(gradients, others)
        if is_host(total.device):
            if not bool(torch.isfinite(total)):
                assert_all_finite(triplets, step, others, self._model)
            return
        if self._unasked >= _PATIENCE:
            self.ask(triplets, others)
        if self._first is None or self._first.device != total.device:
            self._first = torch.zeros((), dtype=torch.int32, device=total.device)
        is_new = ~torch.isfinite(total) & (self._first == 0)
        self._first = torch.where(is_new, step, self._first)
        self._unasked += 1

    def ask(self, triplets: TripletBuffers, others: Sequence[torch.Tensor] = ()) -> None:
        """Ask the device whether a step since the last question had inf or nan; nothing to do in the host's memory.

        The other parameters are those of :meth:`check`, with or without a gradient.

        Raises:
            NonFiniteGradientError: a parameter or a gradient has inf or nan now.
        """
        first, self._first, self._unasked = self._first, None, 0
        if first is None or not (step := int(first)):
            return
        wrong = [name for name, p in _name_all(triplets, others, self._model) if not _is_usable(p)]
        if wrong:  # otherwise finite gradients overflowed in a sum
            raise NonFiniteGradientError(
                f"{len(wrong)} parameters have inf or nan (first: {wrong[0]}), expected finite values; the first such "
                f"gradient was that of step {step}, and the optimizer has used it, because gradients on "
                f"{first.device.type} are checked without waiting for the device. Load the last saved state, and "
                "lower the learning rate, clip the gradients, or use a GradScaler, which skips such a step"
            )


def is_host(device: torch.device) -> bool:
    """Whether values on a device can be read without waiting for anything."""
    return device.type == "cpu"


def assert_all_finite(
    triplets: TripletBuffers, step: int, others: Sequence[torch.Tensor] = (), model: nn.Module | None = None
) -> None:
    """Raise :class:`NonFiniteGradientError`, naming the site or parameter, if a gradient has inf or nan.

    Args:
        triplets: the triplets.
        step: the number of the step, for messages.
        others: other parameters.
        model: where these have names.
    """
    for what, p in _name_all(triplets, others, model):
        if p.grad is not None and not _is_finite(gather_full(p.grad)):
            raise NonFiniteGradientError(
                f"{what} has inf or nan at step {step}, expected finite values; nothing was changed. Lower the "
                "learning rate, clip the gradients, or use a GradScaler, which skips such a step"
            )


def find_others(triplets: TripletBuffers, optimizers: Iterable[torch.optim.Optimizer]) -> list[torch.Tensor]:
    """The parameters of optimizers that belong to no triplet, each once."""
    known = {id(p) for p in triplets.parameters.values()}
    held = (p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"])
    return list({id(p): p for p in held if id(p) not in known}.values())


def _sum_all(gradients: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum of all elements, which is finite if all are, unless it overflows; one fast kernel for each tensor."""
    sums = [gather_full(g.sum()).float() for g in (*gradients, *(p.grad for p in others if p.grad is not None))]
    return sum((s.to(sums[0].device) for s in sums[1:]), start=sums[0])


def _name_all(
    triplets: TripletBuffers, others: Sequence[torch.Tensor], model: nn.Module | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """What a message says of a parameter's gradient, and the parameter."""
    yield from ((f"site {s}: the gradient of {_LETTERS[name]}", p) for (s, name), p in triplets.parameters.items())
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    for number, p in enumerate(others):
        yield f"parameter {names.get(id(p), number)}: the gradient", p


def _is_usable(parameter: torch.Tensor) -> bool:
    """Whether a parameter and its gradient are finite."""
    gradient = parameter.grad
    return _is_finite(gather_full(parameter.detach())) and (gradient is None or _is_finite(gather_full(gradient)))


def _is_finite(gradient: torch.Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient
    return bool(torch.isfinite(values).all())
