"""Which weight gets which adapter, as plain data, checked before any graph is edited."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from passes.base import SiteError
from passes.forms import AdapterForm, find_form
from passes.sites import AdapterSite

#: Written into saved plans; a reader refuses those of another version.
_VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedAdapter:
    """One adapter to be.

    Attributes:
        site: the weight it belongs to.
        form: what it computes.
        rank: number of triplets, or the rank of B A; one of 0 is known by name but not inserted.
        scale: s in ΔW = s · P diag(λ) Q or s · B A.
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
        if self.site.rows is not None and self.form.rescales:
            raise SiteError(
                f"site {self.site.name} covers some rows of its weight, and the form {self.form.name!r} rescales whole "
                "weights; expected a form that only adds, as 'svd' or 'lora'; choose one, or leave split out"
            )

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left of it, so that no graph holds it."""
        return self.form.is_empty(self.rank)

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the adapter's parameters by name."""
        return self.form.parameter_shapes(self.site.out_features, self.site.in_features, self.rank)

    def delta(self, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """ΔW in the shape and layout of the weight, in the dtype of the parameters; 0 in rows it does not cover."""
        return self.site.from_matrix(self.form.delta(parameters, self.scale))

    def rescale(self, total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """W' of W + ΔW, in the shape and layout of the weight; where the form does not rescale, it is that."""
        if not self.form.rescales:
            return total
        rows = self.site.to_matrix(total)
        factor = self.form.factor(rows, parameters)
        return self.site.from_matrix(rows * factor.to(rows.dtype).unsqueeze(1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterPlan:
    """The adapters of a model, in model order, at most one for each row of a weight."""

    adapters: tuple[PlannedAdapter, ...]

    def __post_init__(self) -> None:
        names = [adapter.site.name for adapter in self.adapters]
        doubled = sorted(name for name, count in Counter(names).items() if count > 1)
        if doubled:
            raise SiteError(f"more than one adapter planned for {', '.join(doubled)}; expected one a weight")
        for weight, adapters in self.by_weight.items():
            _assert_disjoint(weight, adapters)

    def __iter__(self) -> Iterator[PlannedAdapter]:
        return iter(self.adapters)

    def __len__(self) -> int:
        return len(self.adapters)

    @functools.cached_property
    def live(self) -> AdapterPlan:
        """Those of which something is left."""
        return AdapterPlan(adapters=tuple(adapter for adapter in self.adapters if not adapter.is_empty))

    @functools.cached_property
    def by_weight(self) -> dict[str, tuple[PlannedAdapter, ...]]:
        """The adapters of each weight: one, or several for different rows."""
        found: dict[str, tuple[PlannedAdapter, ...]] = {}
        for adapter in self.adapters:
            found[adapter.site.weight] = (*found.get(adapter.site.weight, ()), adapter)
        return found

    def restrict_to(self, weights: Collection[str]) -> AdapterPlan:
        """The adapters of these weights; the plan itself if that is all. Costs what it gives, not what there is."""
        if len(weights) >= len(self.by_weight) and self.by_weight.keys() <= set(weights):
            return self
        found = (self.by_weight.get(weight, ()) for weight in dict.fromkeys(weights))
        return AdapterPlan(adapters=tuple(adapter for adapters in found for adapter in adapters))

    def renamed(self, names: Mapping[str, str]) -> AdapterPlan:
        """The same adapters for weights of other names, without what only the whole model knows of a site.

        Args:
            names: the other name of each weight.
        """
        return AdapterPlan(adapters=tuple(_rename(adapter, names[adapter.site.weight]) for adapter in self.adapters))

    def to_json(self) -> str:
        """The plan as text; the weights it was made for are known by name and shape."""
        adapters = [_to_dict(adapter) for adapter in self.adapters]
        return json.dumps({"version": _VERSION, "adapters": adapters}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> AdapterPlan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            SiteError: the text is no plan, or one of another version.
        """
        try:
            data = json.loads(text)
            if data["version"] != _VERSION:
                raise SiteError(f"the plan has version {data['version']!r}, expected {_VERSION}; plan again")
            return cls(adapters=tuple(_from_dict(entry) for entry in data["adapters"]))
        except SiteError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SiteError(f"this is not an adapter plan ({type(error).__name__}: {error})") from error


def _assert_disjoint(weight: str, adapters: Sequence[PlannedAdapter]) -> None:
    ranges = sorted(adapter.site.rows or (0, adapter.site.weight_rows) for adapter in adapters)
    ends = [0, *(end for _, end in ranges)]
    if any(not before <= first < end for before, (first, end) in zip(ends, ranges, strict=False)):
        raise SiteError(f"the adapters planned for {weight} cover rows {ranges}; expected ranges that do not overlap")


def _rename(adapter: PlannedAdapter, weight: str) -> PlannedAdapter:
    site = adapter.site
    name = weight + site.name.removeprefix(site.weight)
    other = dataclasses.replace(site, name=name, aliases=(), role="linear", depth=None)
    return dataclasses.replace(adapter, site=other)


def _to_dict(adapter: PlannedAdapter) -> dict[str, Any]:
    site = {field.name: getattr(adapter.site, field.name) for field in dataclasses.fields(adapter.site)}
    own = {"form": adapter.form.name, "rank": adapter.rank, "scale": adapter.scale}
    return {**site, "dtype": _spell(adapter.site.dtype), **own, "adapter_dtype": _spell(adapter.dtype)}


def _from_dict(entry: Mapping[str, Any]) -> PlannedAdapter:
    fields = {field.name: entry[field.name] for field in dataclasses.fields(AdapterSite)}
    rows = entry["rows"] if entry["rows"] is None else tuple(entry["rows"])
    fields |= {"shape": tuple(entry["shape"]), "aliases": tuple(entry["aliases"]), "rows": rows}
    return PlannedAdapter(
        site=AdapterSite(**{**fields, "dtype": getattr(torch, entry["dtype"])}),
        form=find_form(entry["form"]),
        rank=entry["rank"],
        scale=float(entry["scale"]),
        dtype=getattr(torch, entry["adapter_dtype"]),
    )


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
