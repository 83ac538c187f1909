"""The number of live triplets at each step: AdaLoRA's cubic budget (arXiv 2303.10512, section 3.3) and others."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from adapter_compiler.config.validation import accept_aliases, assert_choice, assert_integer, assert_number
from adapter_compiler.errors import ConfigError
from adapter_compiler.training.budget.allocation import Allocation

#: The share of b0 - bT that is left, as a function of the progress of pruning from 0 to 1.
SHAPES: dict[str, Callable[[float], float]] = {
    "cubic": lambda progress: (1 - progress) ** 3,
    "linear": lambda progress: 1 - progress,
    "constant": lambda progress: 0.0,
}


@accept_aliases(
    target_r="target_rank",
    total_step="total_steps",
    tinit="warmup_steps",
    tfinal="final_steps",
    deltaT="interval",
)
@dataclasses.dataclass(frozen=True, kw_only=True)
class BudgetSchedule:
    """The budget b(t), and the steps of masking. PEFT's names for the options are accepted too.

    With b0 triplets at the start and bT at the end, T = total_steps, ti = warmup_steps and tf = final_steps, the budget
    is b(t) = b0 before ti, then bT + (b0 - bT)(1 - (t - ti)/(T - ti - tf))³, and bT from T - tf on (AdaLoRA, section
    3.3). From T - tf on, the set of live triplets is fixed.

    ``semantics="paper"`` is Algorithm 1 of the paper; it counts steps from 1 to T.
    ``semantics="peft"`` does at each step the same as the code of peft and loralib; it counts steps from 0, as in
    peft's documentation, so it needs ``final_steps >= 1`` to reach its end.

    A budget counts triplets or, with ``target_parameters``, the parameters in them. A triplet at a weight of d1 × d2
    has d1 + d2 + 1 parameters, and only whole triplets are kept.

    Attributes:
        target_rank: average rank of a site at the end; bT = target_rank × number of sites.
        target_parameters: bT in parameters; give either this or ``target_rank``.
        total_steps: T, the number of optimizer steps of the whole training.
        warmup_steps: ti, the number of steps before pruning starts; by default a tenth of T.
        final_steps: tf, the number of steps with the final set; by default three tenths of T.
        interval: ΔT, the number of steps from one masking to the next.
        semantics: ``"paper"`` or ``"peft"``.
        beta1: decay of the smoothed sensitivity Ī (eq. 9).
        beta2: decay of its uncertainty Ū (eq. 10).
        shape: how the budget decreases: ``"cubic"`` (1 - p)³, ``"linear"`` 1 - p, ``"constant"`` (all at once after the
            warm-up), or a function of the progress p = (t - ti)/(T - ti - tf) that returns the share of b0 - bT that is
            left, from 1 to 0.
        allocation: the rule by which the budget chooses the live triplets.
        compact: remove pruned triplets from memory when the set of live triplets becomes fixed.

    Raises:
        ConfigError: a value cannot work, or the schedule would never end.
    """

    target_rank: float | None = dataclasses.field(default=None, metadata={"example": 8})
    total_steps: int = dataclasses.field(metadata={"example": 1000})
    target_parameters: int | None = None
    warmup_steps: int | None = None
    final_steps: int | None = None
    interval: int = 10
    semantics: str = "paper"
    beta1: float = 0.85
    beta2: float = 0.85
    shape: str | Callable[[float], float] = "cubic"
    allocation: Allocation = dataclasses.field(default_factory=Allocation)
    compact: bool = False

    def __post_init__(self) -> None:
        self._check_target()
        assert_integer(self, "total_steps", least=1)
        assert_choice(self, "semantics", ("paper", "peft"))
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", self.total_steps // 10)
        if self.final_steps is None:
            object.__setattr__(self, "final_steps", max(1, 3 * self.total_steps // 10))
        assert_integer(self, "warmup_steps", least=0)
        assert_integer(self, "final_steps", least=0 if self.semantics == "paper" else 1)
        assert_integer(self, "interval", least=1)
        assert_number(self, "beta1", least=0, below=1)
        assert_number(self, "beta2", least=0, below=1)
        if self.warmup + self.final >= self.total_steps:
            raise ConfigError(
                f"the schedule never ends: warmup_steps={self.warmup} + final_steps={self.final} leave no step of "
                f"total_steps={self.total_steps} to prune in; make their sum smaller than total_steps"
            )

    def _check_target(self) -> None:
        if (self.target_rank is None) == (self.target_parameters is None):
            raise ConfigError(
                f"BudgetSchedule(target_rank={self.target_rank}, target_parameters={self.target_parameters}): expected "
                "exactly one of them"
            )
        if self.target_rank is not None:
            assert_number(self, "target_rank", above=0)
        else:
            assert_integer(self, "target_parameters", least=1)
        if not callable(self.shape):
            assert_choice(self, "shape", tuple(SHAPES))
        if not isinstance(self.allocation, Allocation):
            raise ConfigError(f"BudgetSchedule(allocation={self.allocation!r}): expected an Allocation")

    def to_dict(self) -> dict[str, Any]:
        """The options as plain data for JSON, with the name of a function in place of it."""
        options = dataclasses.asdict(self)
        if callable(self.shape):
            options["shape"] = f"{self.shape.__module__}.{getattr(self.shape, '__qualname__', type(self.shape))}"
        return options

    @property
    def counts_parameters(self) -> bool:
        """Whether the budget counts parameters instead of triplets."""
        return self.target_parameters is not None

    @property
    def warmup(self) -> int:
        """The number of warm-up steps, ti, given or by default."""
        assert self.warmup_steps is not None
        return self.warmup_steps

    @property
    def final(self) -> int:
        """The number of final steps, tf, given or by default."""
        assert self.final_steps is not None
        return self.final_steps

    @property
    def first_step(self) -> int:
        """The number of the first optimizer step: 1 in the paper, 0 in peft."""
        return 1 if self.semantics == "paper" else 0

    @property
    def freeze_step(self) -> int:
        """The step of the last masking, T - tf, after which the set of live triplets is fixed."""
        return self.total_steps - self.final

    def target_triplets(self, sites: int, initial: int) -> int:
        """The final budget bT, in triplets or parameters, at most ``initial``."""
        if self.target_rank is None:
            assert self.target_parameters is not None
            return min(self.target_parameters, initial)
        return min(round(self.target_rank * sites), initial)

    def budget(self, step: int, initial: int, target: int) -> int:
        """The budget b(step) for b0 = ``initial`` and bT = ``target``, rounded down as in loralib and peft.

        Raises:
            ConfigError: the function ``shape`` returned a value outside 0 to 1.
        """
        if step <= self.warmup:
            return initial
        if step >= self.freeze_step:
            return target
        progress = (step - self.warmup) / (self.freeze_step - self.warmup)
        remaining = SHAPES[self.shape](progress) if isinstance(self.shape, str) else float(self.shape(progress))
        if not 0 <= remaining <= 1:
            raise ConfigError(
                f"BudgetSchedule(shape={self.shape!r}) gave {remaining} at progress {progress:.3f}, expected 0 to 1"
            )
        return int(target + (initial - target) * remaining)

    def is_masking_step(self, step: int) -> bool:
        """Whether triplets are ranked and masked at ``step``."""
        if step >= self.freeze_step:
            return step == self.freeze_step
        return step > self.warmup and step % self.interval == 0
