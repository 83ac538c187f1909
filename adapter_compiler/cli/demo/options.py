"""The options of the demo."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from adapter_compiler.config.validation import assert_integer, assert_number
from adapter_compiler.errors import ConfigError

LEAST_STEPS = 20
LEAST_TARGET_RANK = 0.5
GREATEST_TARGET_RANK = 16.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of one run. Equal options give equal results on the same machine, except for times.

    Attributes:
        out: the folder for ``model.onnx``, ``report.html`` and ``report.png``; it is created if it does not exist.
        seed: random seed of the split, the initial weights and the batches.
        steps: optimizer steps of the adaptation.
        pretraining_steps: optimizer steps of the pre-training on the first task.
        target_rank: average rank at the end; the initial rank is 1.5 times as large (AdaLoRA, section 4).

    Raises:
        ConfigError: a value cannot work.
    """

    out: Path = Path()
    seed: int = 0
    steps: int = 400
    pretraining_steps: int = 500
    target_rank: float = 2.0

    def __post_init__(self) -> None:
        assert_integer(self, "seed", least=0)
        assert_integer(self, "steps", least=LEAST_STEPS)
        assert_integer(self, "pretraining_steps", least=LEAST_STEPS)
        assert_number(self, "target_rank", least=LEAST_TARGET_RANK)
        if self.target_rank > GREATEST_TARGET_RANK:
            raise ConfigError(
                f"DemoOptions(target_rank={self.target_rank:g}): expected at most {GREATEST_TARGET_RANK:g}, because "
                "adapters of a larger rank are not smaller than the weights of this small model; for example "
                "target_rank=2.0"
            )

    @property
    def rank(self) -> int:
        """The initial rank of each adapter."""
        return math.ceil(1.5 * self.target_rank)
