"""Learning rates by factor: LoRA+ (Hayou et al. 2024, arXiv 2402.12354), and a rate of its own for λ.

With one learning rate for both factors, a wide model does not learn features efficiently; the paper recommends a rate
for B of 16 times that of A. In the SVD form, P has the rate of B, and λ and Q have the rate of A.

A step of Adam at rate lr moves λ by lr each, and so ‖ΔW‖_F by lr √r if the factors are orthonormal; it moves an m × r
factor of LoRA by lr √(m r). Where λ alone trains at first (``init="gaussian"``, ``gradient_svd``), √m times the rate
makes both alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import nn

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.errors import ConfigError

#: The parameters with the larger learning rate.
_LEFT = {"B", "P"}
#: Weight decay would pull magnitudes away from the norms of W's rows, and change the ranking of triplets by λ.
_WITHOUT_DECAY = {"magnitude", "lam"}


def make_parameter_groups(
    adapted: AdapterState,
    lr: float,
    *,
    lora_plus_ratio: float = 1.0,
    lam_ratio: float | str = 1.0,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Parameter groups of all trainable parameters, for any torch optimizer.

    Args:
        adapted: the model.
        lr: learning rate of A or Q, of λ and magnitudes, and of the fully trained parameters.
        lora_plus_ratio: the learning rate of B or P divided by ``lr``; the paper recommends 16.
        lam_ratio: the learning rate of λ divided by ``lr``; ``"sqrt"`` for √m, where m is the number of rows of the
            weight.
        weight_decay: weight decay of all parameters except λ, magnitudes, and fully trained vectors such as biases.

    Returns:
        The groups that are not empty, each with ``params``, ``lr``, ``weight_decay`` and a ``name``.

    Raises:
        ConfigError: ``lr`` or ``lam_ratio`` is negative, or ``lora_plus_ratio`` is less than 1.
    """
    for name, value, least in (("lr", lr, 0.0), ("lora_plus_ratio", lora_plus_ratio, 1.0)):
        if value < least:
            raise ConfigError(f"parameter_groups({name}={value!r}): expected a number of at least {least:g}")
    if lam_ratio != "sqrt" and (not isinstance(lam_ratio, (int, float)) or not 0 <= lam_ratio < float("inf")):
        raise ConfigError(f"parameter_groups(lam_ratio={lam_ratio!r}): expected a number of at least 0, or 'sqrt'")
    rows = {adapter.site.name: adapter.site.out_features for adapter in adapted.plan}
    lam: dict[float, list[nn.Parameter]] = {}
    slow: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    fast = []
    for (site, name), parameter in adapted.adapters.keyed_parameters.items():
        if parameter.requires_grad and name in _LEFT:
            fast.append(parameter)
        elif parameter.requires_grad and name == "lam" and lam_ratio != 1:
            ratio = math.sqrt(rows[site]) if isinstance(lam_ratio, str) else lam_ratio
            lam.setdefault(ratio, []).append(parameter)
        elif parameter.requires_grad:
            slow[name not in _WITHOUT_DECAY].append(parameter)
    for parameter in _find_others(adapted):
        slow[parameter.dim() > 1].append(parameter)
    groups = [
        {"name": "left", "params": fast, "lr": lr * lora_plus_ratio, "weight_decay": weight_decay},
        {"name": "right", "params": slow[True], "lr": lr, "weight_decay": weight_decay},
        {"name": "without decay", "params": slow[False], "lr": lr, "weight_decay": 0.0},
        *({"name": "lam", "params": found, "lr": lr * ratio, "weight_decay": 0.0} for ratio, found in lam.items()),
    ]
    return [group for group in groups if group["params"]]


def _find_others(adapted: AdapterState) -> Iterable[nn.Parameter]:
    return (parameter for parameter in adapted.module.parameters() if parameter.requires_grad)
