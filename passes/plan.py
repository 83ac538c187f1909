"""Which weight gets which adapter, as plain data, checked before any graph is edited."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping

import torch

from passes.base import SiteError
from passes.forms.base import AdapterForm
from passes.sites import AdapterSite


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedAdapter:
    """One adapter to be.

    Attributes:
        site: the weight it belongs to.
        form: what it computes.
        rank: number of triplets; one of 0 is known by name but not inserted.
        scale: s in ΔW = s · P diag(λ) Q.
        dtype: dtype of its parameters.
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

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of it: its parameters have no elements and no graph holds it."""
        return self.rank == 0

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's parameters by name."""
        return self.form.parameter_shapes(self.site.out_features, self.site.in_features, self.rank)

    def delta(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ΔW in the shape and layout of the weight, in the dtype of the parameters."""
        delta = self.form.delta(parameters, self.scale)
        return (delta.t() if self.site.transposed else delta).reshape(self.site.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """The adapters of a model, in model order, at most one a weight."""

    adapters: tuple[PlannedAdapter, ...]

    def __post_init__(self) -> None:
        names = [adapter.site.name for adapter in self.adapters]
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise SiteError(f"more than one adapter planned for {', '.join(doubled)}; expected one a weight")

    def __iter__(self) -> Iterator[PlannedAdapter]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)
