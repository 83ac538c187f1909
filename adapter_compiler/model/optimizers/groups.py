"""Parameter groups of the adapter optimizers, each with a role that says how it is updated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.errors import ConfigError

#: The left factors [out, r], whose columns belong to triplets; the right factors [r, in], whose rows do; and all other
#: parameters, which AdamW updates.
LEFT, RIGHT, OTHER = "left", "right", "other"

_ROLES = {"B": LEFT, "P": LEFT, "A": RIGHT, "Q": RIGHT}

#: Weight decay would change the ranking of triplets by λ, and pull magnitudes away from the norms of W's rows.
_WITHOUT_DECAY = {"lam", "magnitude"}


def find_groups(adapted: AdapterState) -> list[dict[str, Any]]:
    """The trainable parameters by role, without empty groups.

    λ, magnitudes and fully trained vectors have a group of their own, without weight decay.

    Raises:
        ConfigError: nothing is trainable.
    """
    found: dict[tuple[str, bool], list[torch.Tensor]] = {
        (LEFT, True): [],
        (RIGHT, True): [],
        (OTHER, True): [],
        (OTHER, False): [],
    }
    for (_, name), parameter in adapted.adapters.keyed_parameters.items():
        if parameter.requires_grad:
            found[_ROLES.get(name, OTHER), name not in _WITHOUT_DECAY].append(parameter)
    for parameter in adapted.module.parameters():
        if parameter.requires_grad:
            found[OTHER, parameter.dim() > 1].append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": parameters, "role": role} if decays else {"params": parameters, "role": role, "weight_decay": 0.0}
        for (role, decays), parameters in found.items()
        if parameters
    ]
    if not groups:
        raise ConfigError(
            "the adapted model has no trainable parameters, expected adapters; make their optimizer first"
        )
    return groups


def find_names(adapted: AdapterState) -> dict[torch.Tensor, str]:
    """The names of the parameters, for messages."""
    named: dict[torch.Tensor, str] = {p: name for name, p in adapted.module.named_parameters()}
    return named | {p: f"{site}.{name}" for (site, name), p in adapted.adapters.keyed_parameters.items()}


def assert_group_valid(kind: str, group: Mapping[str, Any]) -> None:
    """Raise :class:`ConfigError` unless the options and parameters of a group can work.

    Args:
        kind: the name of the optimizer's class.
        group: the group, with all options.
    """
    if group.get("role") not in (LEFT, RIGHT, OTHER):
        raise ConfigError(
            f"{kind}: a parameter group has role={group.get('role')!r}, expected 'left' (P, B), 'right' (Q, A) or "
            "'other'; give the adapted model in place of its parameters"
        )
    wrong = next((p for p in group["params"] if group["role"] != OTHER and p.dim() != 2), None)
    if wrong is not None:
        raise ConfigError(
            f"{kind}: a parameter of shape {tuple(wrong.shape)} has role={group['role']!r}, expected a matrix; give it "
            "role='other'"
        )
    for name in ("lr", "eps", "weight_decay"):
        if not 0 <= group[name] < float("inf"):
            raise ConfigError(f"{kind}({name}={group[name]!r}): expected a finite number of at least 0")
    _assert_rates_of_decay(kind, "momentum", [group["momentum"]])
    _assert_rates_of_decay(kind, "betas", group["betas"])


def _assert_rates_of_decay(kind: str, name: str, values: Sequence[float]) -> None:
    if len(values) != (2 if name == "betas" else 1) or not all(0 <= value < 1 for value in values):
        expected = "two numbers" if name == "betas" else "a number"
        shown = values if name == "betas" else values[0]
        raise ConfigError(f"{kind}({name}={shown!r}): expected {expected} of at least 0 and less than 1")
