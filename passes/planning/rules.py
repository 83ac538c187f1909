"""Rules: which weights to match, and what to do with them.

The first rule that matches a weight applies to it. The rest of the selection applies to weights that no rule matches.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from passes.analysis.roles import ROLES
from passes.base import SiteError
from passes.forms import FORMS
from passes.planning.site import AdapterSite, abbreviate, find_matching_glob


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRule:
    """Conditions that a weight must all meet, and what to do with the weights that meet them.

    A rule with a name, pattern, role, module or op also adapts weights that ``sites`` does not select, such as
    embeddings. A rule without these only changes the adapters of weights that are selected anyway.

    Attributes:
        name: a glob or globs over the weight's qualified names; one may leave the last part out (``*.query``).
        pattern: a regular expression, searched for in the weight's qualified names.
        role: a glob or globs over roles (``attention.*``), see :data:`passes.analysis.roles.ROLES`.
        module: classes of the module that owns the weight, or globs over their names.
        op: a glob or globs over the site's operator, such as ``linear`` or ``embedding``.
        depth: the number of the block, or ``(first, last)``, both included; needs an example.
        size: smallest and largest number of elements of the weight, ``None`` for no bound.
        kind: what the adapters compute, such as ``svd`` or ``lora``; by default the configuration's.
        rank: rank of the adapters; by default the configuration's.
        alpha: ΔW = alpha / rank · P diag(λ) Q; by default the configuration's.
        split: one adapter for each part of a packed weight: the number of equal parts, or a tuple of their sizes in
            rows of ΔW (output features); ``"matrices"`` for each matrix of a stacked weight, as of one expert.
        exclude: the weights get no adapter.
        required: raise an error if the rule applies to no weight.
        expect: raise an error unless the rule applies to this many weights.

    Raises:
        SiteError: an option has an invalid value, names a role that does not exist, or contradicts another option.
    """

    name: str | tuple[str, ...] | None = None
    pattern: str | None = None
    role: str | tuple[str, ...] | None = None
    module: str | type[nn.Module] | tuple[str | type[nn.Module], ...] | None = None
    op: str | tuple[str, ...] | None = None
    depth: int | tuple[int, int] | None = None
    size: tuple[int | None, int | None] | None = None
    kind: str | None = None
    rank: int | None = None
    alpha: float | None = None
    split: int | tuple[int, ...] | str | None = None
    exclude: bool = False
    required: bool = True
    expect: int | None = None

    def __post_init__(self) -> None:
        for option in ("name", "role", "op"):
            if not all(isinstance(glob, str) and glob for glob in _as_tuple(getattr(self, option))):
                raise self._error(option, "a glob or a tuple of globs")
        for role in _as_tuple(self.role):
            if not any(fnmatch.fnmatchcase(known, role) for known in ROLES):
                raise self._error("role", f"globs over {', '.join(ROLES)}")
        self._check_pattern()
        self._check_bounds()
        self._check_numbers()

    @property
    def names_weights(self) -> bool:
        """Whether the rule has a condition other than depth and size."""
        return any(option is not None for option in (self.name, self.pattern, self.role, self.module, self.op))

    def matches(self, site: AdapterSite, owner: nn.Module) -> bool:
        """Whether the weight of ``site``, a parameter of ``owner``, meets every condition."""
        names = (site.name, *site.aliases)
        return (
            (self.name is None or find_matching_glob(names, _as_tuple(self.name)) is not None)
            and (self.pattern is None or any(re.search(self.pattern, name) for name in names))
            and _matches_one(site.role, self.role)
            and _matches_one(site.op, self.op)
            and (self.module is None or any(_is_class(owner, wanted) for wanted in _as_tuple(self.module)))
            and self._fits(site)
        )

    def split_site(self, site: AdapterSite) -> list[AdapterSite]:
        """The site itself, or one site for each part, named ``<weight>.rows_<first>_<end>``.

        Raises:
            SiteError: the weight cannot be split in this way.
        """
        if self.split is None:
            return [site]
        sizes = self._find_sizes(site)
        if len(sizes) < 2 or min(sizes) < 1 or sum(sizes) != site.weight_rows:
            raise SiteError(
                f"site {site.name}: split={self.split!r} does not split the {site.weight_rows} rows of a weight of "
                f"shape {site.shape}; expected a number that divides them, sizes that add up to them, or 'matrices' "
                "for a weight of three dimensions"
            )
        ends = list(itertools.accumulate(sizes))
        rows = zip((0, *ends), ends, strict=False)
        return [dataclasses.replace(site, name=f"{site.name}.rows_{a}_{b}", rows=(a, b)) for a, b in rows]

    def _find_sizes(self, site: AdapterSite) -> tuple[int, ...]:
        if isinstance(self.split, tuple):
            return self.split
        if self.split == "matrices":
            parts = site.shape[0] if len(site.shape) == 3 and not site.transposed and "conv" not in site.op else 0
        else:
            parts = int(self.split or 0)
        return (site.weight_rows // parts,) * parts if parts else ()

    def assert_decided(self, names: Sequence[str], candidates: Sequence[AdapterSite]) -> None:
        """Raise :class:`SiteError` if the rule applies to too few or too many weights.

        Args:
            names: the weights that it applies to.
            candidates: all weights that can have an adapter.
        """
        if self.expect is not None and len(names) != self.expect:
            raise SiteError(f"{self} applies to {len(names)} weights, expected {self.expect}: {abbreviate(names)}")
        if self.required and self.expect is None and not names:
            found = sorted({site.role for site in candidates})
            raise SiteError(
                f"{self} applies to no weight: none matches, or earlier rules match first. There are roles "
                f"{', '.join(found)} and weights {abbreviate([site.name for site in candidates], 6)}. Roles and depths "
                "need an example; allow no match with required=False"
            )

    def __str__(self) -> str:
        """The rule with the options that were given."""
        given = ((f.name, getattr(self, f.name), f.default) for f in dataclasses.fields(self))
        return f"AdapterRule({', '.join(f'{name}={value!r}' for name, value, default in given if value != default)})"

    def _fits(self, site: AdapterSite) -> bool:
        if self.depth is not None:
            first, last = self.depth if isinstance(self.depth, tuple) else (self.depth, self.depth)
            if site.depth is None or not first <= site.depth <= last:
                return False
        least, greatest = self.size or (None, None)
        return (least is None or site.size >= least) and (greatest is None or site.size <= greatest)

    def _check_pattern(self) -> None:
        try:
            re.compile(self.pattern or "")
        except (re.error, TypeError) as error:
            raise self._error("pattern", f"a regular expression ({error})") from error
        for entry in _as_tuple(self.module):
            if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
                raise self._error("module", "classes of torch.nn.Module or globs over their names")

    def _check_bounds(self) -> None:
        depth = (self.depth, self.depth) if isinstance(self.depth, int) else self.depth
        if depth is not None and not (_is_pair(depth) and all(type(n) is int for n in depth) and depth[0] <= depth[1]):
            raise self._error("depth", "the number of a block, or (first, last)")
        if self.size is not None and not (_is_pair(self.size) and all(n is None or type(n) is int for n in self.size)):
            raise self._error("size", "(least, greatest), each a number of values or None")

    def _check_numbers(self) -> None:
        if self.kind is not None and self.kind not in FORMS:
            raise self._error("kind", f"one of {', '.join(FORMS)}")
        if self.rank is not None and (type(self.rank) is not int or self.rank < 1):
            raise self._error("rank", "an integer of at least 1")
        if self.alpha is not None and not (isinstance(self.alpha, (int, float)) and self.alpha > 0):  # type: ignore[redundant-expr]
            raise self._error("alpha", "a number above 0")
        if self.expect is not None and (type(self.expect) is not int or self.expect < 0):
            raise self._error("expect", "a number of weights")
        sizes = (self.split,) if isinstance(self.split, int) else self.split
        if sizes not in (None, "matrices") and not (
            isinstance(sizes, tuple) and sizes and all(type(n) is int and n > 0 for n in sizes)
        ):
            raise self._error("split", "a number of equal parts, a tuple of sizes, or 'matrices'")
        if self.exclude and any(option is not None for option in (self.kind, self.rank, self.alpha)):
            raise self._error("exclude", "no kind, no rank and no alpha together with it")

    def _error(self, option: str, expected: str) -> SiteError:
        return SiteError(f"AdapterRule({option}={getattr(self, option)!r}): expected {expected}")


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return () if value is None else value if isinstance(value, tuple) else (value,)


def _is_pair(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2


def _matches_one(value: str, globs: str | tuple[str, ...] | None) -> bool:
    return globs is None or any(fnmatch.fnmatchcase(value, glob) for glob in _as_tuple(globs))


def _is_class(owner: nn.Module, wanted: str | type[nn.Module]) -> bool:
    if isinstance(wanted, type):
        return isinstance(owner, wanted)
    return any(fnmatch.fnmatchcase(cls.__name__, wanted) for cls in type(owner).__mro__)
