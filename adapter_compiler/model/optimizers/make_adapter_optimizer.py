"""The optimizer of an adapted model, by the name of its rule."""

from __future__ import annotations

from typing import Any

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.optimizers.adapter_optimizer import AdapterMuon, AdapterNormalized, AdapterOptimizer

#: The optimizers by the names of their rules.
RULES: dict[str, type[AdapterOptimizer]] = {"muon": AdapterMuon, "triplet": AdapterNormalized}


def make_adapter_optimizer(adapted: AdapterState, lr: float, *, rule: str = "muon", **options: Any) -> AdapterOptimizer:
    """An optimizer over all trainable parameters of an adapted model, see :func:`adapter_compiler.make_optimizer`.

    Raises:
        ConfigError: an option cannot work, or the model has nothing to train.
    """
    if rule not in RULES:
        raise ConfigError(f"make_optimizer(rule={rule!r}): expected one of {', '.join(map(repr, RULES))}")
    return RULES[rule](adapted, lr, **options)
