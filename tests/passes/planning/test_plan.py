"""Plans are checked before any graph is edited."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from passes.base import SiteError
from passes.forms import SvdForm, find_form
from passes.planning.plan import AdapterPlan, PlannedAdapter
from passes.planning.site import AdapterSite


def plan_one(rank: int, name: str = "w") -> PlannedAdapter:
    site = AdapterSite(name=name, shape=(5, 3), dtype=torch.float32)
    return PlannedAdapter(site=site, form=SvdForm(), rank=rank, scale=1.0, dtype=torch.float32)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_does_not_fit_is_refused(rank: int) -> None:
    with pytest.raises(SiteError, match=rf"site w: rank {rank} does not fit a weight of 5 × 3; expected 0 to 3"):
        plan_one(rank)


def test_two_adapters_on_one_weight_are_refused() -> None:
    with pytest.raises(SiteError, match="more than one adapter planned for w"):
        AdapterPlan(adapters=(plan_one(1), plan_one(2)))


def test_shapes_and_order() -> None:
    plan = AdapterPlan(adapters=(plan_one(2, "b"), plan_one(3, "a")))
    assert [adapter.site.name for adapter in plan] == ["b", "a"]
    assert len(plan) == 2
    assert plan_one(2).parameter_shapes == {"P": (5, 2), "lam": (2,), "Q": (2, 3)}


def describe(**changes: Any) -> dict[str, Any]:
    """A saved plan of three adapters, with these changes in the second one."""
    half = AdapterSite(name="a.rows_0_2", shape=(5, 3), dtype=torch.float16, aliases=("b", "c"), rows=(0, 2), depth=3)
    packed = PlannedAdapter(site=half, form=find_form("svd-offset2"), rank=2, scale=0.5, dtype=torch.float64)
    turned = AdapterSite(name="t", shape=(5, 3), dtype=torch.float32, transposed=True)
    product = PlannedAdapter(site=turned, form=find_form("dora"), rank=1, scale=2.0, dtype=torch.bfloat16)
    data: dict[str, Any] = json.loads(AdapterPlan(adapters=(packed, plan_one(2), product)).to_json())
    data["adapters"][1] |= changes
    return data


def read(data: Any) -> AdapterPlan:
    return AdapterPlan.from_json(json.dumps(data))


def test_a_saved_plan_comes_back() -> None:
    plan = read(describe())
    assert plan.adapters[1] == plan_one(2)
    assert plan.adapters[0].site.rows == (0, 2)
    assert plan.adapters[2].site.transposed
    assert AdapterPlan.from_json(plan.to_json()) == plan
    assert AdapterPlan.from_json(AdapterPlan(adapters=()).to_json()) == AdapterPlan(adapters=())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "manual_seed"}, "dtype is 'manual_seed', expected the name of a floating-point dtype"),
        ({"dtype": "int64"}, "dtype is 'int64', expected the name of a floating-point dtype"),
        ({"dtype": "float"}, "dtype is 'float', expected the name of a floating-point dtype"),
        ({"adapter_dtype": "set_default_dtype"}, "adapter_dtype is 'set_default_dtype', expected the name of a fl"),
        ({"adapter_dtype": None}, "adapter_dtype is None, expected the name of a floating-point dtype"),
        ({"shape": [5, 0]}, r"shape is \[5, 0\], expected a list of two or more positive integers"),
        ({"shape": [5, True]}, r"shape is \[5, True\], expected a list of two or more positive integers"),
        ({"shape": [5]}, r"shape is \[5\], expected a list of two or more positive integers"),
        ({"shape": "53"}, "shape is '53', expected a list of two or more positive integers"),
        ({"shape": [2**40, 2**40]}, "shape is .*, expected a list of two or more positive integers"),
        ({"rank": True}, "rank is True, expected a number of triplets"),
        ({"rank": 2.0}, "rank is 2.0, expected a number of triplets"),
        ({"rank": -1}, "rank is -1, expected a number of triplets"),
        ({"rank": 4}, "site w: rank 4 does not fit a weight of 5 × 3; expected 0 to 3"),
        ({"scale": float("nan")}, "scale is nan, expected a finite number"),
        ({"scale": float("inf")}, "scale is inf, expected a finite number"),
        ({"scale": "1"}, "scale is '1', expected a finite number"),
        ({"scale": 10**400}, "scale is 1000+.*, expected a finite number"),
        ({"form": "svd-offset02"}, "form is 'svd-offset02', expected one of svd, lora, dora, dora-svd, or one of th"),
        ({"form": "lora-offset1-offset1"}, "form is 'lora-offset1-offset1', expected one of"),
        ({"form": "lora-offset" + "9" * 5000}, "form is 'lora-offset.*, expected one of"),
        ({"form": "lora-offset4"}, "form is 'lora-offset4', expected a rank at the start of at most 3"),
        ({"form": ["svd"]}, r"form is \['svd'\], expected one of"),
        ({"transposed": 1}, "transposed is 1, expected true or false"),
        ({"transposed": True, "shape": [5, 3, 2]}, r"transposed is true for the shape \(5, 3, 2\), expected two dime"),
        ({"aliases": "ab"}, "aliases is 'ab', expected a list of names"),
        ({"depth": -1}, "depth is -1, expected null or the number of a block"),
        ({"role": None}, "role is None, expected the name of a role"),
        ({"op": 3}, "op is 3, expected the name of an operator"),
        ({"rows": [0, 2]}, r"rows are \(0, 2\) of 5, expected .* a name that ends with \.rows_0_2"),
        ({"rows": [2, 9], "name": "w.rows_2_9"}, r"rows are \(2, 9\) of 5, expected a range in them"),
        ({"rows": [0, 1, 2]}, r"rows is \[0, 1, 2\], expected null or \[first, end\]"),
        ({"name": ""}, "the plan: adapter 1: name is '', expected the qualified name of a weight"),
        ({"name": "t"}, "more than one adapter planned for t"),
        ({"color": 1}, "the plan: adapter 1 .'w'.: the key 'color' is unknown, expected adapter_dtype, aliases,"),
    ],
)
def test_an_invalid_entry_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        read(describe(**changes))


@pytest.mark.parametrize("key", sorted(describe()["adapters"][1]))
def test_an_entry_that_lacks_a_key_is_named(key: str) -> None:
    data = describe()
    del data["adapters"][1][key]
    with pytest.raises(SiteError, match=rf"the plan: adapter 1.*: the key '{key}' is missing, expected .* there; pass"):
        read(data)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the plan: this is not JSON .Expecting value"),
        ("[" * 100_000, "this is not JSON .RecursionError"),
        ("[" * 200 + "]" * 200, "its objects and lists are nested more than 100 levels deep"),
        ("1" * 5000, "this is not JSON .ValueError"),
        (b"\xff", "this is not JSON .UnicodeDecodeError"),
        (None, "this is a NoneType, expected JSON text"),
        ("[" + "," * 5_000_000, "the JSON text holds about 5,000,001 values, expected at most 2,000,000"),
        ("[]", "this is not an adapter plan, expected an object with a version"),
        ("{}", "this is not an adapter plan, expected an object with a version"),
        ('{"version": 2}', "the plan has version 2, expected 1; plan again"),
        ('{"version": true, "adapters": []}', "the plan has version True, expected 1"),
        ('{"version": 1}', "the key 'adapters' is missing, expected a list there"),
        ('{"version": 1, "adapters": [], "more": 1}', "the key 'more' is unknown, expected adapters, version"),
        ('{"version": 1, "adapters": {}}', "adapters is {}, expected a list"),
        ('{"version": 1, "adapters": [3]}', "adapter 0 is 3, expected an object"),
        ('{"version": 1, "version": 1, "adapters": []}', "the key 'version' appears twice in one object"),
    ],
    ids=range(16),
)
def test_a_text_that_is_not_a_plan_is_refused(text: Any, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        AdapterPlan.from_json(text)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(0, 6)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["svd", "lora-offset1", "float32", "manual_seed", "w", "a.rows_0_2", "t"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5) | st.just("name"), inner, max_size=4)
    ),
    max_leaves=6,
)


def find_places(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths to all values in nested lists and dicts."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [above, *(place for key, one in items for place in find_places(one, (*above, key)))]


def change(data: Any, place: tuple[Any, ...], action: str, value: Any) -> Any:
    """The data with the value at one place replaced, removed or duplicated, or with another value added there."""
    if not place:
        return value
    holder = data
    for key in place[:-1]:
        holder = holder[key]
    if action == "remove":
        del holder[place[-1]]
    elif action == "double" and isinstance(holder, list):
        holder.append(holder[place[-1]])
    elif action == "add" and isinstance(holder, dict):
        holder[str(value)] = value
    else:
        holder[place[-1]] = value
    return data


@given(st.data())
def test_changed_plans_are_read_or_refused_with_a_message(draw: st.DataObject) -> None:
    data: Any = describe()
    for _ in range(draw.draw(st.integers(1, 3))):
        place = draw.draw(st.sampled_from(find_places(data)))
        data = change(
            data,
            place,
            draw.draw(st.sampled_from(["replace", "replace", "remove", "double", "add"])),
            draw.draw(VALUES),
        )
    try:
        plan = read(data)
    except SiteError as error:
        assert str(error)
        return
    assert AdapterPlan.from_json(plan.to_json()) == plan
    for adapter in plan:
        assert adapter.site.out_features > 0
        assert adapter.site.in_features > 0
        assert adapter.dtype.is_floating_point
        assert adapter.site.dtype.is_floating_point
        assert all(size >= 0 for shape in adapter.parameter_shapes.values() for size in shape)


@given(st.text() | VALUES.map(json.dumps) | st.binary())
def test_any_text_is_read_or_refused_with_a_message(text: Any) -> None:
    with contextlib.suppress(SiteError):
        AdapterPlan.from_json(text)
