"""The optimizer of an adapted model in one call, also through the wrappers of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.optimizers.adapter_optimizer import AdapterOptimizer
from adapter_compiler.model.optimizers.make_adapter_optimizer import make_adapter_optimizer
from adapter_compiler.training.budget.stepping.wrappers import unwrap_model


def make_optimizer(
    adapted: AdapterState | Callable[..., Any],
    lr: float,
    *,
    rule: str = "muon",
    other_lr: float | None = None,
    momentum: float = 0.8,
    betas: tuple[float, float] = (0.8, 0.9),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdapterOptimizer:
    """An optimizer over all trainable parameters of an adapted model, made for adapters.

    See :mod:`adapter_compiler.model.optimizers.adapter_optimizer` for the rules. ``adapted.make_optimizer(lr)`` is the
    same for a model that no other library has wrapped.

    Args:
        adapted: the result of ``compile_with_adapters``, also inside DDP or ``torch.compile``.
        lr: learning rate of P and Q (B and A); an element moves by about this much in a step.
        rule: ``"muon"``, or ``"triplet"``, which is cheaper.
        other_lr: learning rate of λ, magnitudes and fully trained parameters, by default ``lr``.
        momentum: μ of P and Q.
        betas: of AdamW for the others.
        eps: of AdamW for the others.
        weight_decay: decoupled weight decay of all parameters except λ, magnitudes, and fully trained vectors.

    Raises:
        ConfigError: an option cannot work, or the model has nothing to train.
    """
    found = unwrap_model(adapted, AdapterState)
    if not isinstance(found, AdapterState):
        raise ConfigError(
            f"make_optimizer got a {type(found).__name__}, expected the result of compile_with_adapters; for another "
            "model, use an optimizer of torch"
        )
    return make_adapter_optimizer(
        found,
        lr,
        rule=rule,
        other_lr=other_lr,
        momentum=momentum,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
    )
