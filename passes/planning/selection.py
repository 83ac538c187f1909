"""Which weights the user wants to adapt: by what they are used for, or by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from passes.base import SiteError
from passes.planning.rules import AdapterRule
from passes.planning.site import AdapterSite, abbreviate, find_matching_glob

#: Selects every weight that is used by matrix products only.
ALL_LINEAR = "all-linear"

#: Selects these, convolutions, recurrent layers, and tables of a sensible size.
AUTO = "auto"

#: Numbers of rows of a look-up table that ``"auto"`` adapts. An adapter of rank r has r values for each row: a column
#: of categories is well below the upper bound, a vocabulary above it, most of whose rows a batch does not touch.
_TABLE_ROWS = (8, 10_000)

_RECURRENT = ("lstm", "gru", "rnn")
_TABLES = ("embedding", "embedding_bag")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SiteSelection:
    """Which weights the user wants to adapt.

    Attributes:
        sites: ``"all-linear"``, ``"auto"`` or globs over qualified weight names (``*.query.weight``); a glob
            may also match the name without its last part (``*.query``).
        exclude: globs of weights that get no adapter.
        trainable: globs of parameters that are trained fully and therefore get no adapter.
        rules: the first rule that matches a weight applies to it; rules come before ``sites``.
    """

    sites: str | tuple[str, ...] = ALL_LINEAR
    exclude: tuple[str, ...] = ()
    trainable: tuple[str, ...] = ()
    rules: tuple[AdapterRule, ...] = ()

    def find_reason_against(self, names: Sequence[str]) -> str | None:
        """Why no rule can select the weight with these names (several if it is tied), or ``None``."""
        if pattern := find_matching_glob(names, self.trainable):
            return f"trained fully (trainable={pattern!r})"
        if pattern := find_matching_glob(names, self.exclude):
            return f"excluded (exclude={pattern!r})"
        return None

    def find_reason_against_site(self, site: AdapterSite, rule: AdapterRule | None) -> str | None:
        """Why a weight that can have an adapter is not selected, or ``None``; ``rule`` is the one that matches it."""
        if rule is not None and rule.exclude:
            return f"excluded by {rule}"
        if rule is not None and rule.names_weights:
            return None
        return self.sites_reason(site)

    def sites_reason(self, site: AdapterSite) -> str | None:
        """Why ``sites`` does not select a weight that can have an adapter, or ``None`` if it does."""
        if self._globs():
            chosen = find_matching_glob((site.name, *site.aliases), self._globs()) is not None
            return None if chosen else f"not selected (sites={self.sites!r})"
        if site.op == "linear":
            return None
        if self.sites == ALL_LINEAR:
            return f"used by {site.op}, not only by matrix products (name it in sites to adapt it)"
        return _find_reason_against_kind(site)

    def assert_globs_match(self, names: Iterable[str]) -> None:
        """Raise :class:`SiteError` for a glob that no weight's name matches."""
        names = list(names)
        for option, globs in (("sites", self._globs()), ("exclude", self.exclude)):
            for pattern in globs:
                if find_matching_glob(names, (pattern,)) is None:
                    raise SiteError(
                        f"{option}={pattern!r} matches no weight, expected a glob that does; correct it or leave it "
                        f"out; there are: {abbreviate(names)}"
                    )

    def _globs(self) -> tuple[str, ...]:
        if self.sites in (ALL_LINEAR, AUTO):
            return ()
        return (self.sites,) if isinstance(self.sites, str) else tuple(self.sites)


def _find_reason_against_kind(site: AdapterSite) -> str | None:
    """Why ``"auto"`` does not select a weight that is used by more than matrix products, or ``None`` if it does."""
    if "conv" in site.op or site.op.startswith(_RECURRENT):
        return None
    if site.op not in _TABLES:
        return f"used by {site.op}, which sites={AUTO!r} leaves out (name it in sites to adapt it)"
    least, most = _TABLE_ROWS
    if least <= site.shape[0] <= most:
        return None
    return f"a table of {site.shape[0]:,} rows, sites={AUTO!r} takes {least} to {most:,} (name it in sites to adapt it)"
