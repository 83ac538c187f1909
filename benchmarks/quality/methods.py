"""The methods that the quality benchmark compares, with as many values at the end as LoRA and scale s = alpha / rank.

Only rsLoRA has another scale, alpha / √rank with the alpha of LoRA: it would else be LoRA itself. DoRA trains a
magnitude for each row beside, and peft's AdaLoRA can count ranks only; the number of values that are left is part of
every result.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

#: torch's betas, and those for runs of a few hundred steps.
SLOW, FAST = (0.9, 0.999), (0.8, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """One way of training.

    Attributes:
        guess: the learning rate at which the search begins, for tasks of width 64; it goes on until the best rate has a
            worse one on each side.
        betas: of AdamW.
        options: of ``AdapterConfig``; ``None`` for what is not ours.
        start: an initializer that needs data.
        peft: ``"lora"`` or ``"adalora"`` for peft's.
        rule: of ``make_optimizer``; AdamW without it.
        surplus: the rank at the start over that at the end; above 1 a budget prunes.
        metric: the score of the budget.
        lam_times: the learning rate of λ over that of P and Q.
        repeats: a method whose best rate is run again with other random numbers.
    """

    guess: float
    betas: tuple[float, float] = FAST
    options: Mapping[str, Any] | None = None
    start: str | None = None
    peft: str | None = None
    rule: str | None = None
    surplus: float = 1.0
    metric: str = "sensitivity"
    lam_times: float = 1.0
    repeats: str | None = None


_ADAMW: dict[str, Method] = {
    "full": Method(guess=2.5e-3),
    "lora": Method(guess=6.4e-3, options={"kind": "lora"}),
    "lora_orthogonal": Method(guess=6.4e-3, options={"kind": "lora", "init": "orthogonal"}),
    "rslora": Method(guess=6.4e-3, options={"kind": "lora", "scaling": "rslora"}),
    "dora": Method(guess=6.4e-3, options={"kind": "dora"}),
    "pissa": Method(guess=6.4e-3, options={"kind": "lora", "init": "pissa"}),
    "lora_ga": Method(guess=4e-3, options={"kind": "lora"}, start="lora_ga"),
    "adalora": Method(guess=6.4e-3, options={"kind": "svd"}, surplus=1.5),
    "adalora_magnitude": Method(guess=6.4e-3, options={"kind": "svd"}, surplus=1.5, metric="magnitude"),
    # √64, the width of most models here.
    "adalora_lambda": Method(guess=6.4e-3, options={"kind": "svd"}, surplus=1.5, lam_times=8.0),
    "peft_lora": Method(guess=6.4e-3, peft="lora"),
    "peft_adalora": Method(guess=2e-2, peft="adalora", surplus=1.5),
}
_BUDGET = Method(guess=2.5e-3, options={"kind": "svd"}, rule="muon", surplus=1.5, metric="magnitude")
_MATRICES: dict[str, Method] = {
    "muon": Method(guess=2.5e-3, options={"kind": "lora", "init": "orthogonal"}, rule="muon"),
    "muon_svd": Method(guess=2.5e-3, options={"kind": "svd"}, rule="muon"),
    "muon_budget": _BUDGET,
    "muon_budget_3x": dataclasses.replace(_BUDGET, surplus=3.0),
    "muon_budget_4x": dataclasses.replace(_BUDGET, surplus=4.0),
    "muon_sensitivity": dataclasses.replace(_BUDGET, metric="sensitivity"),
    "muon_spectral": dataclasses.replace(_BUDGET, metric="spectral"),
    "muon_lora_one": dataclasses.replace(_BUDGET, start="lora_one"),
    "triplet": Method(guess=2.5e-3, options={"kind": "lora", "init": "orthogonal"}, rule="triplet"),
    "triplet_budget": Method(guess=2.5e-3, options={"kind": "svd"}, rule="triplet", surplus=1.5, metric="magnitude"),
}
#: What the others are compared with: LoRA with the better betas.
REFERENCE = "lora"
#: What other libraries have, with the better betas. The best of them on a task is its best peer.
PEERS = ("lora", "rslora", "dora", "pissa", "lora_ga", "peft_lora", "peft_adalora")

METHODS: dict[str, Method] = {
    **_ADAMW,
    **{f"{name}_slow": dataclasses.replace(method, betas=SLOW) for name, method in _ADAMW.items()},
    **_MATRICES,
    # The same method again, with other starts and batches: how far two rows differ by chance.
    "lora_again": dataclasses.replace(_ADAMW["lora"], repeats="lora"),
}
