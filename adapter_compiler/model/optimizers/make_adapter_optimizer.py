"""The optimizer of an adapted model, by the name of its rule."""

from __future__ import annotations

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.optimizers.adapter_optimizer import AdapterMuon, AdapterNormalized, AdapterOptimizer

#: The optimizers by the names of their rules.
RULES: dict[str, type[AdapterOptimizer]] = {"muon": AdapterMuon, "triplet": AdapterNormalized}


def make_adapter_optimizer(
    adapted: AdapterState,
    lr: float,
    *,
    rule: str = "muon",
    other_lr: float | None = None,
    momentum: float = 0.8,
    betas: tuple[float, float] = (0.8, 0.9),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> AdapterOptimizer:
    """An optimizer over all trainable parameters of an adapted model, see :func:`adapter_compiler.make_optimizer`.

    Raises:
        ConfigError: an option cannot work, or the model has nothing to train.
    """
    if rule not in RULES:
        raise ConfigError(f"make_optimizer(rule={rule!r}): expected one of {', '.join(map(repr, RULES))}")
    make = RULES[rule]
    return make(adapted, lr, other_lr=other_lr, momentum=momentum, betas=betas, eps=eps, weight_decay=weight_decay)
