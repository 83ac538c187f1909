"""Write adapter plans as JSON, and read and check such texts."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch

from passes.base import SiteError
from passes.forms import FORMS, AdapterForm, find_form
from passes.forms.offset import START
from passes.planning.json_schema import (
    LARGEST_SIZE,
    Field,
    Source,
    check_object,
    is_count,
    is_finite,
    is_flag,
    is_list_of,
    is_or_null,
    is_text,
    parse_json,
    show,
)
from passes.planning.site import AdapterSite

#: Version of saved plans; other versions are refused.
_VERSION = 1

_SOURCE = Source(name="the plan", error=SiteError, advice="pass a text that AdapterPlan.to_json returned")

#: Used instead of ``getattr(torch, name)``, which has many more names; reading some of them imports modules.
_DTYPES: Mapping[str, torch.dtype] = {
    str(value).removeprefix("torch."): value
    for value in vars(torch).values()
    if isinstance(value, torch.dtype) and value.is_floating_point
}


class Planned(Protocol):
    """An adapter of a plan; see :class:`passes.planning.plan.PlannedAdapter`."""

    @property
    def site(self) -> AdapterSite:
        """The weight that it adapts."""

    @property
    def form(self) -> AdapterForm:
        """What it computes."""

    @property
    def rank(self) -> int:
        """The number of its triplets."""

    @property
    def scale(self) -> float:
        """s in ΔW = s · P diag(λ) Q or s · B A."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its parameters."""


def write_plan(adapters: Iterable[Planned]) -> str:
    """The JSON text of a plan, which identifies weights by name and shape."""
    return json.dumps({"version": _VERSION, "adapters": [_to_dict(adapter) for adapter in adapters]}, indent=1)


def read_plan(text: str) -> list[dict[str, Any]]:
    """The site, form, rank, scale and dtype of each adapter of a saved plan.

    Raises:
        SiteError: the text is not a plan or has another version; the message names the entry and the key.
    """
    data = parse_json(_SOURCE, text)
    if not isinstance(data, dict) or "version" not in data:
        _SOURCE.fail("this is not an adapter plan, expected an object with a version")
    if type(data["version"]) is not int or data["version"] != _VERSION:
        raise SiteError(f"the plan has version {show(data['version'])}, expected {_VERSION}; plan again")
    check_object(_SOURCE, "", data, _PLAN)
    return [_from_entry(number, entry) for number, entry in enumerate(data["adapters"])]


def _to_dict(adapter: Planned) -> dict[str, Any]:
    site = {field.name: getattr(adapter.site, field.name) for field in dataclasses.fields(adapter.site)}
    own = {"form": adapter.form.name, "rank": adapter.rank, "scale": adapter.scale}
    return {**site, "dtype": _spell(adapter.site.dtype), **own, "adapter_dtype": _spell(adapter.dtype)}


def _is_range(value: Any) -> bool:
    return is_list_of(is_count)(value) and len(value) == 2


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and value in _DTYPES


def _is_shape(value: Any) -> bool:
    is_list = is_list_of(is_count)(value) and len(value) >= 2 and all(value)
    return is_list and math.prod(value) <= LARGEST_SIZE


def _is_form(value: Any) -> bool:
    try:
        return isinstance(value, str) and find_form(value).name == value
    except (KeyError, ValueError):  # no such form, or its rank has more digits than Python converts
        return False


_PLAN: Mapping[str, Field] = {
    "version": Field(expected=str(_VERSION), fits=is_count),
    "adapters": Field(expected="a list", fits=lambda value: isinstance(value, list)),
}

_ENTRY: Mapping[str, Field] = {
    "name": Field(expected="the qualified name of a weight", fits=is_text),
    "shape": Field(expected="a list of two or more positive integers", fits=_is_shape),
    "dtype": Field(expected="the name of a floating-point dtype, such as 'float32'", fits=_is_dtype),
    "transposed": Field(expected="true or false", fits=is_flag),
    "op": Field(expected="the name of an operator, such as 'linear'", fits=is_text),
    "aliases": Field(expected="a list of names", fits=is_list_of(is_text)),
    "role": Field(expected="the name of a role, such as 'linear'", fits=is_text),
    "depth": Field(expected="null or the number of a block", fits=is_or_null(is_count)),
    "rows": Field(expected="null or [first, end]", fits=is_or_null(_is_range)),
    "form": Field(expected=f"one of {', '.join(FORMS)}, or one of these with -offset and a rank", fits=_is_form),
    "rank": Field(expected="a number of triplets", fits=is_count),
    "scale": Field(expected="a finite number", fits=is_finite),
    "adapter_dtype": Field(expected="the name of a floating-point dtype, such as 'float32'", fits=_is_dtype),
}


def _from_entry(number: int, entry: Any) -> dict[str, Any]:
    where = f"adapter {number}"
    if isinstance(entry, dict) and is_text(entry.get("name")):
        where += f" ({show(entry['name'])})"
    entry = check_object(_SOURCE, where, entry, _ENTRY)
    fields = {field.name: entry[field.name] for field in dataclasses.fields(AdapterSite)}
    rows = None if entry["rows"] is None else tuple(entry["rows"])
    fields |= {"shape": tuple(entry["shape"]), "aliases": tuple(entry["aliases"]), "rows": rows}
    site = AdapterSite(**{**fields, "dtype": _DTYPES[entry["dtype"]]})
    form = find_form(entry["form"])
    assert_consistent(_SOURCE, where, site, form)
    own = {"rank": entry["rank"], "scale": float(entry["scale"]), "dtype": _DTYPES[entry["adapter_dtype"]]}
    return {"site": site, "form": form, **own}


def assert_consistent(source: Source, where: str, site: AdapterSite, form: AdapterForm) -> None:
    """Raise the source's error if values of a site that are valid alone contradict each other."""
    if site.transposed and len(site.shape) != 2:
        source.fail(f"{where}: transposed is true for the shape {site.shape}, expected two dimensions")
    if site.rows is not None:
        first, end = site.rows
        suffix = f".rows_{first}_{end}"
        if not first < end <= site.weight_rows or not site.name.endswith(suffix) or site.name == suffix:
            source.fail(
                f"{where}: rows are {site.rows} of {site.weight_rows}, expected a range in them and a name that ends "
                f"with {suffix}"
            )
    starts = [size for name, shape in form.parameter_shapes(1, 1, 0).items() if name.endswith(START) for size in shape]
    if max(starts, default=0) > max(1, site.largest_rank):
        source.fail(f"{where}: form is {form.name!r}, expected a rank at the start of at most {site.largest_rank}")


def _spell(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
