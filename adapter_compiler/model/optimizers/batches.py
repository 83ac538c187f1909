"""Parameters of one group and shape, which an update takes as one stack [n, …], and the checks of their gradients."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch

from adapter_compiler.adapters.parameters.sharded import gather_full, is_sharded
from adapter_compiler.errors import ConfigError, NonFiniteGradientError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Parameters of one shape, dtype, device and group.

    Attributes:
        group: the optimizer's group.
        parameters: the parameters.
        states: the optimizer's state of each.
        gradients: the gradient of each, in at least float32.
    """

    group: dict[str, Any]
    parameters: list[torch.Tensor]
    states: list[dict[str, Any]]
    gradients: list[torch.Tensor]

    @functools.cached_property
    def stacked_gradients(self) -> torch.Tensor:
        """The gradients, [n, …]."""
        return stack(self.gradients)

    def moments(self, name: str) -> list[torch.Tensor]:
        """The state tensors of this name, in at least float32; missing ones start as zeros."""
        for state, parameter, gradient in zip(self.states, self.parameters, self.gradients, strict=True):
            if name not in state:
                state[name] = torch.zeros_like(parameter, dtype=gradient.dtype)
        return [state[name] for state in self.states]


def stack(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """[n, …]; one tensor alone is not copied."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def find_batches(
    groups: Iterable[dict[str, Any]],
    states: MutableMapping[torch.Tensor, dict[str, Any]],
    names: Mapping[torch.Tensor, str],
) -> list[Batch]:
    """All parameters that have a gradient, in batches.

    Args:
        groups: the optimizer's groups.
        states: the optimizer's state; parameters that step for the first time are added.
        names: names of parameters, for messages.

    Raises:
        ConfigError: a gradient is sparse or complex.
        NonFiniteGradientError: a gradient has inf or nan.
    """
    batches = [batch for group in groups for batch in _split(group, states, names)]
    # One synchronization with the device for all batches. A sum can also overflow, so its parts are looked at.
    sums = [gather_full(batch.stacked_gradients.sum()).float() for batch in batches]
    if sums and not bool(torch.stack([one.to(sums[0].device) for one in sums]).isfinite().all()):
        _assert_finite(batches, names)
    for batch in batches:
        states.update(zip(batch.parameters, batch.states, strict=True))
    return batches


def _split(
    group: dict[str, Any], states: Mapping[torch.Tensor, dict[str, Any]], names: Mapping[torch.Tensor, str]
) -> Iterator[Batch]:
    found: dict[Hashable, Batch] = {}
    for parameter in group["params"]:
        gradient = parameter.grad
        if gradient is None or not parameter.numel():
            continue
        _assert_usable(parameter, gradient, names)
        state = states.get(parameter, {})
        # Sharded parameters are gathered one after another, and AdamW's corrections depend on the number of steps.
        own = id(parameter) if is_sharded(parameter) else float(state.get("step", 0))
        key = (parameter.shape, parameter.dtype, parameter.device, is_sharded(parameter), own)
        batch = found.setdefault(key, Batch(group=group, parameters=[], states=[], gradients=[]))
        batch.parameters.append(parameter)
        batch.states.append(state)
        batch.gradients.append(gradient.to(torch.promote_types(parameter.dtype, torch.float32)))
    yield from found.values()


def _assert_usable(parameter: torch.Tensor, gradient: torch.Tensor, names: Mapping[torch.Tensor, str]) -> None:
    if gradient.layout is not torch.strided or gradient.is_complex():
        kind = "complex" if gradient.is_complex() else "sparse"
        raise ConfigError(
            f"the gradient of {_describe(parameter, names)} is {kind}, expected a dense real one; make the layer with "
            "sparse=False, or train it with an optimizer of its own"
        )


def _assert_finite(batches: Iterable[Batch], names: Mapping[torch.Tensor, str]) -> None:
    pairs = [pair for batch in batches for pair in zip(batch.parameters, batch.gradients, strict=True)]
    wrong = [p for p, gradient in pairs if not bool(gather_full(gradient.mul(0).sum()).isfinite())]
    if wrong:
        raise NonFiniteGradientError(
            f"the gradients of {len(wrong)} of {len(pairs)} parameters have inf or nan (first: "
            f"{_describe(wrong[0], names)}), expected finite numbers; nothing was changed. Lower the learning rate, "
            "clip gradients, or step through a GradScaler, which skips such steps"
        )


def _describe(parameter: torch.Tensor, names: Mapping[torch.Tensor, str]) -> str:
    return names.get(parameter, f"a parameter of shape {tuple(parameter.shape)}")
