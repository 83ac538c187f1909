"""The adapter plan: which weight gets which adapter, as plain data, checked before any graph is edited."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch

from passes.base import SiteError
from passes.forms import AdapterForm, MixtureForm
from passes.forms.routed import FIXED
from passes.planning.plan_json import read_plan, write_plan
from passes.planning.site import AdapterSite


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedAdapter:
    """One adapter of a plan.

    Attributes:
        site: the weight that it adapts.
        form: what it computes.
        rank: number of triplets, or the rank of B A; an adapter of rank 0 stays in the plan but is not inserted.
        scale: s in ΔW = s · P diag(λ) Q or s · B A.
        dtype: dtype of its parameters.

    Raises:
        SiteError: the rank does not fit the weight or the form's groups, or the form does not fit a site that covers
            only some rows.
    """

    site: AdapterSite
    form: AdapterForm
    rank: int
    scale: float
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if not 0 <= self.rank <= self.site.largest_rank:
            raise SiteError(
                f"site {self.site.name}: rank {self.rank} does not fit a weight of {self.site.out_features} × "
                f"{self.site.in_features}; expected 0 to {self.site.largest_rank}"
            )
        if self.rank % self.form.groups:
            raise SiteError(
                f"site {self.site.name}: rank {self.rank} cannot be shared out among {self.form.groups} experts of "
                f"{self.form.name!r}; expected a multiple of {self.form.groups}"
            )
        if self.site.rows is not None and self.form.rescales:
            raise SiteError(
                f"site {self.site.name} covers only some rows of its weight, but the form {self.form.name!r} rescales "
                "whole weights; expected a form that only adds, such as 'svd' or 'lora'; choose one, or remove split"
            )

    @property
    def is_empty(self) -> bool:
        """Whether the adapter changes nothing, so that it is not inserted."""
        return self.form.is_empty(self.rank)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's parameters by name."""
        return self.form.parameter_shapes(self.site.out_features, self.site.in_features, self.rank)

    def assert_matrix(self) -> None:
        """Raise :class:`SiteError` if the update depends on the call, so that no ΔW can be added to the weight."""
        if self.form.is_routed:
            raise SiteError(
                f"site {self.site.name} has the form {self.form.name!r}, whose update depends on the call and is no "
                f"matrix, so only matrix products x Wᵀ with the weight can use it; {FIXED}, or exclude the site"
            )

    def delta(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ΔW in the shape and layout of the weight, in the parameters' dtype; 0 in rows outside the site.

        Raises:
            SiteError: the update depends on the call.
        """
        self.assert_matrix()
        return self.site.from_matrix(self.form.delta(parameters, self.scale))

    def add_to(
        self, weight: torch.Tensor, parameters: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """W' = W + ΔW, rescaled if the form rescales, in the shape and layout of the weight.

        Args:
            weight: W.
            parameters: the adapter's parameters by name.
            dtype: compute the sum in this dtype, without gradients; by default in that of the weight, with gradients.
        """
        delta = self.delta(parameters).to(weight.dtype if dtype is None else dtype)
        # In place when folding: a large model is folded weight by weight, and this sum determines the peak memory.
        return self.rescale(weight + delta if dtype is None else delta.add_(weight), parameters)

    def rescale(self, total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """W' given ``total`` = W + ΔW, in the shape and layout of the weight; ``total`` unless the form rescales."""
        if not self.form.rescales:
            return total
        rows = self.site.to_matrix(total)
        factor = self.form.factor(rows, parameters)
        return self.site.from_matrix(rows * factor.to(rows.dtype).unsqueeze(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """The adapters of a model, in model order, at most one for each row of a weight.

    Raises:
        SiteError: two adapters have the same site or cover the same row of a weight, or a mixture takes its gates from
            a site without a router.
    """

    adapters: tuple[PlannedAdapter, ...]

    def __post_init__(self) -> None:
        names = [adapter.site.name for adapter in self.adapters]
        doubled = sorted(name for name, count in Counter(names).items() if count > 1)
        if doubled:
            raise SiteError(f"more than one adapter planned for {', '.join(doubled)}; expected one per weight")
        for weight, adapters in self.by_weight.items():
            _assert_disjoint(weight, adapters)
        _assert_leaders(self.adapters)

    def __iter__(self) -> Iterator[PlannedAdapter]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    @functools.cached_property
    def live(self) -> AdapterPlan:
        """The plan without the adapters that change nothing."""
        return AdapterPlan(adapters=tuple(adapter for adapter in self.adapters if not adapter.is_empty))

    @functools.cached_property
    def by_weight(self) -> dict[str, tuple[PlannedAdapter, ...]]:
        """The adapters of each weight: one, or several for different rows."""
        found: dict[str, tuple[PlannedAdapter, ...]] = {}
        for adapter in self.adapters:
            found[adapter.site.weight] = (*found.get(adapter.site.weight, ()), adapter)
        return found

    def to_json(self) -> str:
        """The plan as JSON text, which identifies weights by name and shape."""
        return write_plan(self.adapters)

    @classmethod
    def from_json(cls, text: str) -> AdapterPlan:
        """The plan that :meth:`to_json` wrote.

        Args:
            text: JSON. Every key must appear exactly once, and no other keys. Types are checked strictly: ``true`` is
                not accepted as the rank 1.

        Raises:
            SiteError: the text is not a plan or has another version; the message names the entry and the key.
        """
        return cls(adapters=tuple(PlannedAdapter(**fields) for fields in read_plan(text)))


def _assert_disjoint(weight: str, adapters: Sequence[PlannedAdapter]) -> None:
    ranges = sorted(adapter.site.rows or (0, adapter.site.weight_rows) for adapter in adapters)
    ends = [0, *(end for _, end in ranges)]
    if any(not before <= first < end for before, (first, end) in zip(ends, ranges, strict=False)):
        raise SiteError(f"the adapters planned for {weight} cover rows {ranges}; expected ranges that do not overlap")


def _assert_leaders(adapters: Sequence[PlannedAdapter]) -> None:
    mixtures = {a.site.name: a.form for a in adapters if isinstance(a.form, MixtureForm)}
    for name, form in mixtures.items():
        leader = mixtures.get(form.leader, None if form.leader else form)
        if leader is None or leader.leader or _gating(leader) != _gating(form):
            raise SiteError(
                f"site {name} takes the gates of {form.leader}, which has "
                f"{'no mixture' if leader is None else f'the form {leader.name!r}'} in this plan; expected a site with "
                "a router for as many experts, which chooses them in the same way; plan again"
            )


def _gating(form: MixtureForm) -> tuple[int, int, bool]:
    return form.experts, form.top_k, form.per_example
