"""Gradients of frozen weights, averaged over batches, a few weights at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.config.progress import tell
from adapter_compiler.errors import ConfigError, SiteError
from adapter_compiler.model.adapted_model import AdaptedModel
from passes.capture.module_state import restored_state
from passes.planning.plan import PlannedAdapter

#: Computes the loss of one batch: ``loss(model, batch)``.
Loss = Callable[[nn.Module, Any], torch.Tensor]


def find_weight_gradients(
    adapted: AdaptedModel,
    batches: Iterable[Any],
    loss: Loss,
    *,
    at_once: int = 1,
    with_adapters: bool = False,
) -> Iterator[tuple[PlannedAdapter, torch.Tensor]]:
    """The gradient ∂L/∂W [out, in] of every adapted weight, averaged over the batches.

    With ``at_once=1``, memory holds one gradient at most, but each weight needs a pass over the batches. Random states
    and buffers that the runs change are restored, and every pass starts from the same random states.

    Args:
        adapted: the model; it runs in its present training mode.
        batches: the batches; they are read several times if there are several passes.
        loss: ``loss(model, batch)`` returns the loss of a batch; the model is called like the user's.
        at_once: the number of gradients in memory at once.
        with_adapters: whether the gradient is taken at W + ΔW instead of W.

    Yields:
        Each adapter with the gradient of its weight, in model order.

    Raises:
        ConfigError: there is no batch.
        SiteError: the loss does not depend on a weight, or its gradient is not finite.
    """
    collected = as_batches(batches)
    plan = list(adapted.plan)
    loss = tell_batches(loss, -(-len(plan) // at_once) * len(collected))
    for start in range(0, len(plan), at_once):
        group = plan[start : start + at_once]
        weights = [adapted.base_weight(adapter.site.weight) for adapter in group]
        _accumulate(adapted, weights, collected, loss, with_adapters=with_adapters)
        gradients = [weight.grad for weight in weights]
        for weight in weights:
            weight.grad = None
        # Adapters for different rows of one weight share the gradient tensor, which must be divided only once.
        for gradient in {id(gradient): gradient for gradient in gradients if gradient is not None}.values():
            gradient.div_(len(collected))
        for adapter in group:
            yield adapter, _check(adapter, gradients.pop(0))


def tell_batches(loss: Loss, total: int) -> Loss:
    """A loss that also tells how many of ``total`` batches have been run."""
    done = 0

    def told(model: nn.Module, batch: Any) -> Any:
        nonlocal done
        tell("run batches", done, total)
        done += 1
        return loss(model, batch)

    return told


def assert_adapted(adapted: object, function: str) -> None:
    """Raise :class:`ConfigError` unless ``function`` was given an adapted model."""
    if not isinstance(adapted, AdaptedModel):
        raise ConfigError(
            f"{function}(adapted=...) is a {type(adapted).__name__}, expected an AdaptedModel; give what "
            "compile_with_adapters returned"
        )


def assert_matrices(adapted: AdaptedModel, function: str) -> None:
    """Raise :class:`ConfigError` if an update depends on the call: the gradient of the weight says nothing of it."""
    for adapter in adapted.plan:
        if adapter.form.is_routed:
            raise ConfigError(
                f"{function}: site {adapter.site.name} has the form {adapter.form.name!r}, whose update depends on the "
                "call, expected a form that adds one matrix to the weight (svd, lora); leave this call out"
            )


def as_batches(batches: Iterable[Any]) -> Sequence[Any]:
    """The batches as a sequence.

    Raises:
        ConfigError: there is no batch.
    """
    collected = batches if isinstance(batches, Sequence) else list(batches)
    if not len(collected):
        raise ConfigError("batches is empty, expected at least one batch; give a list of batches that the loss takes")
    return collected


def _accumulate(
    adapted: AdaptedModel, weights: Sequence[nn.Parameter], batches: Sequence[Any], loss: Loss, *, with_adapters: bool
) -> None:
    context = contextlib.nullcontext() if with_adapters else adapted.disable_adapters()
    with _only_these_train(adapted, weights), restored_state(adapted.module), context, torch.enable_grad():
        for batch in batches:
            value = loss(adapted, batch)
            if value.requires_grad:
                value.backward()


@contextlib.contextmanager
def _only_these_train(adapted: AdaptedModel, weights: Sequence[nn.Parameter]) -> Iterator[None]:
    """A context in which only these weights require grad; flags and other gradients are restored afterwards."""
    parameters = list(adapted.parameters())
    before = [(parameter.requires_grad, parameter.grad) for parameter in parameters]
    wanted = {id(weight) for weight in weights}
    try:
        for parameter in parameters:
            parameter.requires_grad_(id(parameter) in wanted)
            parameter.grad = None
        yield
    finally:
        for parameter, (flag, gradient) in zip(parameters, before, strict=True):
            parameter.requires_grad_(flag)
            if id(parameter) not in wanted:
                parameter.grad = gradient


def _check(adapter: PlannedAdapter, gradient: torch.Tensor | None) -> torch.Tensor:
    if gradient is None:
        raise SiteError(
            f"site {adapter.site.name}: the loss does not depend on the weight, expected a gradient; compute the loss "
            "with the model that your loss function gets as its argument, or exclude the weight"
        )
    if not bool(torch.isfinite(gradient).all()):
        raise SiteError(
            f"site {adapter.site.name}: the gradient of the weight has inf or nan, expected finite values; use other "
            "batches, or float32"
        )
    return adapter.site.to_matrix(gradient)
