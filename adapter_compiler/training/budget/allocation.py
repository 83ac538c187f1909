"""The options of an allocation: the rule by which a budget chooses the live triplets."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from adapter_compiler.config.validation import accept_aliases, assert_choice, assert_number
from adapter_compiler.errors import BudgetError, ConfigError
from adapter_compiler.training.scoring.metrics import METRICS
from passes.planning.site import find_matching_glob

#: The values of ``Allocation(allocator=...)``.
ALLOCATORS = ("adalora", "redistribute")


@accept_aliases(min_r="min_rank", max_r="max_rank")
@dataclasses.dataclass(frozen=True, kw_only=True)
class Allocation:
    """The rule by which a budget chooses the live triplets.

    ``allocator="adalora"`` keeps the triplets with the best scores over all sites (arXiv 2303.10512).
    ``allocator="redistribute"`` first gives each site a rank in proportion to its importance, a smoothed ‖ΔW‖_F, by the
    largest-remainder method. It then keeps the triplets with the best scores within each site.

    Attributes:
        metric: the score of a triplet: ``"sensitivity"`` (Ī·Ū), ``"importance"`` (I) or ``"magnitude"``
            (|λ| ‖p‖ ‖q‖, which is |λ| if the factors are orthonormal).
        allocator: ``"adalora"`` or ``"redistribute"``.
        min_rank: the least number of triplets that each site keeps; a number, or numbers by glob over site names.
        max_rank: the largest number of triplets that each site keeps, in the same form; ``None`` for no limit.
        grow: the share of the budget that each masking except the last gives to pruned triplets, to those with the
            largest smoothed |∂L/∂λ|.
        smoothing: the decay β of the site importance in ``"redistribute"`` and of |∂L/∂λ|.

    Raises:
        ConfigError: a value cannot work.
    """

    metric: str = "sensitivity"
    allocator: str = "adalora"
    min_rank: int | Mapping[str, int] = 0
    max_rank: int | Mapping[str, int] | None = None
    grow: float = 0.0
    smoothing: float = 0.85

    def __post_init__(self) -> None:
        assert_choice(self, "metric", METRICS)
        assert_choice(self, "allocator", ALLOCATORS)
        assert_number(self, "grow", least=0, below=1)
        assert_number(self, "smoothing", least=0, below=1)
        for name in ("min_rank", "max_rank"):
            value = getattr(self, name)
            for number in value.values() if isinstance(value, Mapping) else [value]:
                if number is None and name == "max_rank":
                    continue
                if isinstance(number, bool) or not isinstance(number, int) or number < 0:
                    raise ConfigError(f"Allocation({name}={value!r}): expected integers of at least 0")

    def bounds(self, sites: Sequence[str], ranks: Sequence[int]) -> tuple[list[int], list[int]]:
        """The least and the largest rank of each site, both at most its present rank.

        Args:
            sites: the names of the sites.
            ranks: the present rank of each site.

        Raises:
            BudgetError: a glob matches no site, or a minimum exceeds its maximum.
        """
        low = [_look_up(self.min_rank, site, default=0) for site in sites]
        high = [_look_up(self.max_rank, site, default=rank) for site, rank in zip(sites, ranks, strict=True)]
        for option in (self.min_rank, self.max_rank):
            for glob in option if isinstance(option, Mapping) else ():
                if not any(find_matching_glob([site], (glob,)) for site in sites):
                    raise BudgetError(
                        f"Allocation: {glob!r} matches no site, expected a glob that does; correct it or leave it out; "
                        f"there are: {', '.join(sites[:8])}"
                    )
        for site, least, most in zip(sites, low, high, strict=True):
            if least > most:
                raise BudgetError(
                    f"site {site}: min_rank {least} exceeds max_rank {most}, expected a minimum of at most {most}; "
                    "lower min_rank or raise max_rank"
                )
        clipped = [min(a, rank) for a, rank in zip(low, ranks, strict=True)]
        return clipped, [min(b, rank) for b, rank in zip(high, ranks, strict=True)]


def _look_up(option: int | Mapping[str, int] | None, site: str, *, default: int) -> int:
    if isinstance(option, Mapping):
        found = [value for glob, value in option.items() if find_matching_glob([site], (glob,))]
        return found[0] if found else default
    return default if option is None else option
