"""What can be chosen about the demo."""

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
    """Options of one run; equal options give equal numbers on the same machine, times apart.

    Attributes:
        out: the folder for ``model.onnx`` and ``report.png``; it is made if it is not there.
        seed: decides the split, the starting weights and the batches.
        steps: optimizer steps of the adaptation.
        pretraining_steps: optimizer steps before that, on the first task.
        target_rank: average rank at the end; the adapters start with one and a half times as much (paper, section 4).

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
                "adapters of more than that are no smaller than this small model's weights"
            )

    @property
    def rank(self) -> int:
        """The rank that each adapter starts with."""
        return math.ceil(1.5 * self.target_rank)
