"""Which weights a rule matches, and which rules are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from passes.analysis.weight_uses import find_parameter_aliases, find_weight_uses
from passes.base import SiteError
from passes.planning.find_sites import find_sites
from passes.planning.rules import AdapterRule
from passes.planning.selection import SiteSelection
from passes.planning.site import AdapterSite

SITE = AdapterSite(
    name="encoder.layers.3.q_proj.weight",
    shape=(8, 4),
    dtype=torch.float32,
    aliases=("tied.weight",),
    role="attention.query",
    depth=3,
)


class MyLinear(nn.Linear):
    """A user's subclass."""


@pytest.mark.parametrize(
    ("options", "matches"),
    [
        ({}, True),
        ({"name": "*.q_proj"}, True),
        ({"name": ("*.k_proj", "*.q_proj.weight")}, True),
        ({"name": "tied"}, True),
        ({"name": "q_proj"}, False),
        ({"pattern": r"layers\.[2-4]\."}, True),
        ({"pattern": r"layers\.[0-1]\."}, False),
        ({"role": "attention.*"}, True),
        ({"role": ("feed_forward.*", "head")}, False),
        ({"module": nn.Linear}, True),
        ({"module": ("Embedding", "My*")}, True),
        ({"module": nn.Embedding}, False),
        ({"op": "linear"}, True),
        ({"op": "embedding"}, False),
        ({"depth": 3}, True),
        ({"depth": (4, 9)}, False),
        ({"size": (None, 32)}, True),
        ({"size": (33, None)}, False),
        ({"role": "attention.*", "depth": (0, 3), "size": (32, 32), "module": "Linear"}, True),
        ({"role": "attention.*", "depth": (0, 2)}, False),
    ],
)
def test_every_condition_must_hold(options: dict[str, Any], matches: bool) -> None:
    assert AdapterRule(**options).matches(SITE, MyLinear(4, 8)) is matches


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"role": "attention.querry"}, r"role='attention.querry'\): expected globs over attention.query"),
        ({"name": 3}, r"name=3\): expected a glob"),
        ({"pattern": "("}, r"pattern='\('\): expected a regular expression"),
        ({"module": int}, "expected classes of torch.nn.Module"),
        ({"depth": (3, 1)}, "expected the number of a block"),
        ({"size": 5}, "least, greatest"),
        ({"rank": 0}, "expected an integer of at least 1"),
        ({"alpha": -1.0}, "expected a number above 0"),
        ({"expect": -1}, "expected a number of weights"),
        ({"exclude": True, "rank": 4}, "no rank and no alpha together with it"),
    ],
)
def test_invalid_rules_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(SiteError, match=message):
        AdapterRule(**options)


def search(prepare: Any, *rules: AdapterRule) -> Any:
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 6), nn.Linear(6, 4))
    found = prepare(model, torch.tensor([[1, 2]])).captured.graph_module
    uses = find_weight_uses(found, find_parameter_aliases(model))
    return find_sites(uses, model, SiteSelection(rules=rules))


def test_the_first_rule_that_matches_decides(prepare: Any) -> None:
    first, second = AdapterRule(name="1", rank=2), AdapterRule(op="linear", exclude=True)
    found = search(prepare, first, second)
    assert [site.name for site in found.sites] == ["1.weight"]
    assert found.rules["1.weight"] is first
    assert found.rejected["2.weight"] == "excluded by AdapterRule(op='linear', exclude=True)"


def test_a_rule_that_names_weights_adapts_weights_that_all_linear_does_not(prepare: Any) -> None:
    names = [site.name for site in search(prepare, AdapterRule(module="Embedding")).sites]
    assert names == ["0.weight", "1.weight", "2.weight"]
    assert [site.name for site in search(prepare, AdapterRule(size=(1, None))).sites] == ["1.weight", "2.weight"]


def test_a_rule_that_never_applies_is_an_error_unless_it_is_optional(prepare: Any) -> None:
    with pytest.raises(SiteError, match=r"name='1'\) applies to no weight: none matches, or earlier rules match"):
        search(prepare, AdapterRule(op="*"), AdapterRule(name="1"))
    assert len(search(prepare, AdapterRule(op="*"), AdapterRule(name="1", required=False)).sites) == 3


def test_counts_are_asserted(prepare: Any) -> None:
    assert len(search(prepare, AdapterRule(op="linear", expect=2)).sites) == 2
    with pytest.raises(SiteError, match="applies to 2 weights, expected 3"):
        search(prepare, AdapterRule(op="linear", expect=3))
