"""Which weight gets which adapter, as plain data, checked before any graph is edited."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import reprlib
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch

from passes.base import SiteError
from passes.forms import FORMS, AdapterForm, find_form
from passes.forms.offset import START
from passes.planning.site import AdapterSite

#: Written into saved plans; a reader refuses those of another version.
_VERSION = 1

#: What to do with a text that is no plan.
_ADVICE = "give what AdapterPlan.to_json wrote"

#: The largest number that torch can hold as a size.
_LARGEST = 2**63 - 1

#: Not by attribute of torch: that has many more names, and some import something.
_DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and value.is_floating_point
}


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

    def to_json(self) -> str:
        """The plan as text; the weights it was made for are known by name and shape."""
        adapters = [_to_dict(adapter) for adapter in self.adapters]
        return json.dumps({"version": _VERSION, "adapters": adapters}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> AdapterPlan:
        """The plan that :meth:`to_json` wrote.

        Args:
            text: JSON. Each key must be there once, and none besides; a value of another kind than :meth:`to_json`
                writes is not taken for it, as ``true`` for the rank 1.

        Raises:
            SiteError: the text is no plan, or one of another version; the message names the entry and the key.
        """
        return cls(adapters=tuple(_from_entry(number, entry) for number, entry in enumerate(_read_entries(text))))


def _read_entries(text: str) -> list[Any]:
    """The entries of a saved plan, of whatever kind."""
    try:
        data = json.loads(text, object_pairs_hook=_as_dict)
    except SiteError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise SiteError(f"this is not an adapter plan, but {type(error).__name__}: {error}; {_ADVICE}") from error
    if not isinstance(data, dict) or "version" not in data:
        raise SiteError(f"this is not an adapter plan, expected an object with a version; {_ADVICE}")
    if type(data["version"]) is not int or data["version"] != _VERSION:
        raise SiteError(f"the plan has version {_show(data['version'])}, expected {_VERSION}; plan again")
    _assert_keys("the plan", data, {"version", "adapters"})
    if not isinstance(data["adapters"], list):
        raise SiteError(f"the plan's adapters are {_show(data['adapters'])}, expected a list; {_ADVICE}")
    return data["adapters"]


def _as_dict(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    if doubled := sorted(key for key, count in Counter(key for key, _ in pairs).items() if count > 1):
        raise SiteError(f"the plan has the key {_show(doubled[0])} twice in one object, expected it once; {_ADVICE}")
    return dict(pairs)


def _assert_keys(where: str, found: Mapping[str, Any], expected: Collection[str]) -> None:
    if odd := sorted(found.keys() ^ expected):
        problem = "has an unknown key" if odd[0] in found else "lacks the key"
        raise SiteError(f"{where} {problem} {_show(odd[0])}, expected {', '.join(sorted(expected))}; {_ADVICE}")


def _assert_disjoint(weight: str, adapters: Sequence[PlannedAdapter]) -> None:
    ranges = sorted(adapter.site.rows or (0, adapter.site.weight_rows) for adapter in adapters)
    ends = [0, *(end for _, end in ranges)]
    if any(not before <= first < end for before, (first, end) in zip(ends, ranges, strict=False)):
        raise SiteError(f"the adapters planned for {weight} cover rows {ranges}; expected ranges that do not overlap")


def _to_dict(adapter: PlannedAdapter) -> dict[str, Any]:
    site = {field.name: getattr(adapter.site, field.name) for field in dataclasses.fields(adapter.site)}
    own = {"form": adapter.form.name, "rank": adapter.rank, "scale": adapter.scale}
    return {**site, "dtype": _spell(adapter.site.dtype), **own, "adapter_dtype": _spell(adapter.dtype)}


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _LARGEST


def _is_range(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_count, value))


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _is_shape(value: Any) -> bool:
    is_list = isinstance(value, list) and len(value) >= 2 and all(_is_count(size) and size for size in value)
    return is_list and math.prod(value) <= _LARGEST


def _is_form(value: Any) -> bool:
    try:
        return isinstance(value, str) and find_form(value).name == value
    except (KeyError, ValueError):  # no such form, or a number in it that is longer than Python reads
        return False


#: What an entry holds: the words for what is expected, and whether a value is that.
_FIELDS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("the qualified name of a weight", _is_text),
    "shape": ("a list of two or more positive integers", _is_shape),
    "dtype": ("the name of a floating-point dtype, such as 'float32'", _is_dtype),
    "transposed": ("true or false", lambda value: isinstance(value, bool)),
    "op": ("the name of an operator, such as 'linear'", _is_text),
    "aliases": ("a list of names", lambda value: isinstance(value, list) and all(map(_is_text, value))),
    "role": ("the name of a role, such as 'linear'", _is_text),
    "depth": ("null or the number of a block", lambda value: value is None or _is_count(value)),
    "rows": ("null or [first, end]", lambda value: value is None or _is_range(value)),
    "form": (f"one of {', '.join(FORMS)}, or one of these with -offset and a rank", _is_form),
    "rank": ("a number of triplets", _is_count),
    "scale": ("a finite number", lambda value: type(value) in (int, float) and abs(value) <= sys.float_info.max),
    "adapter_dtype": ("the name of a floating-point dtype, such as 'float32'", _is_dtype),
}


def _from_entry(number: int, entry: Any) -> PlannedAdapter:
    where = f"the plan's adapter {number}"
    if not isinstance(entry, dict):
        raise SiteError(f"{where} is {_show(entry)}, expected an object; {_ADVICE}")
    if _is_text(entry.get("name")):
        where += f" ({_show(entry['name'])})"
    _assert_keys(where, entry, _FIELDS.keys())
    for key, (expected, fits) in _FIELDS.items():
        if not fits(entry[key]):
            raise SiteError(f"{where}: {key} is {_show(entry[key])}, expected {expected}; {_ADVICE}")
    return _plan_entry(where, entry)


def _plan_entry(where: str, entry: Mapping[str, Any]) -> PlannedAdapter:
    fields = {field.name: entry[field.name] for field in dataclasses.fields(AdapterSite)}
    rows = None if entry["rows"] is None else tuple(entry["rows"])
    fields |= {"shape": tuple(entry["shape"]), "aliases": tuple(entry["aliases"]), "rows": rows}
    site = AdapterSite(**{**fields, "dtype": _DTYPES[entry["dtype"]]})
    form = find_form(entry["form"])
    _assert_consistent(where, site, form)
    dtype = _DTYPES[entry["adapter_dtype"]]
    return PlannedAdapter(site=site, form=form, rank=entry["rank"], scale=float(entry["scale"]), dtype=dtype)


def _assert_consistent(where: str, site: AdapterSite, form: AdapterForm) -> None:
    """Raise :class:`SiteError` where values that are right by themselves contradict each other."""
    if site.transposed and len(site.shape) != 2:
        raise SiteError(f"{where}: transposed is true for the shape {site.shape}, expected two dimensions; {_ADVICE}")
    if site.rows is not None:
        first, end = site.rows
        suffix = f".rows_{first}_{end}"
        if not first < end <= site.weight_rows or not site.name.endswith(suffix) or site.name == suffix:
            raise SiteError(
                f"{where}: rows are {site.rows} of {site.weight_rows}, expected a range in them and a name that ends "
                f"with {suffix}; {_ADVICE}"
            )
    starts = [size for name, shape in form.parameter_shapes(1, 1, 0).items() if name.endswith(START) for size in shape]
    if max(starts, default=0) > max(1, site.largest_rank):
        raise SiteError(
            f"{where}: form is {form.name!r}, expected a rank at the start of at most {site.largest_rank}; {_ADVICE}"
        )


def _show(value: Any) -> str:
    return reprlib.repr(value)


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
