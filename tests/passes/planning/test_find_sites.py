"""Which weights become sites, and the reason for each other weight."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from passes.base import SiteError
from passes.planning.find_sites import find_module_sites
from passes.planning.selection import SiteSelection
from passes.planning.site import find_matching_glob

Prepare = Callable[..., Any]


class Zoo(nn.Module):
    """One weight for each possible result of the search."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.linear = nn.Linear(4, 4)
        self.raw = nn.Parameter(torch.randn(4, 6))
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.linear.weight
        self.blind = nn.Linear(4, 4)
        self.dead = nn.Linear(4, 4)
        self.idle = nn.Linear(4, 4)
        self.stacked = nn.Parameter(torch.randn(2, 6, 3))
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tied(self.linear(self.embed(tokens))) * self.scale
        with torch.no_grad():
            x = x + self.blind(x)
        self.dead(x)
        y: Tensor = (x @ self.raw).flatten(0, 1) @ self.stacked[0]
        return y


TOKENS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def test_every_weight_is_a_site_or_has_a_reason(prepare: Prepare) -> None:
    search = prepare(Zoo(), TOKENS).search
    sites = {site.name: site for site in search.sites}
    assert sites.keys() == {"raw", "linear.weight", "stacked"}
    assert (sites["stacked"].out_features, sites["stacked"].in_features) == (12, 3)
    assert sites["linear.weight"].aliases == ("tied.weight",)
    assert (sites["raw"].transposed, sites["raw"].out_features, sites["raw"].in_features) == (True, 6, 4)
    assert sites["raw"].largest_rank == 4
    reasons = dict(search.rejected)
    assert reasons.keys() == {"embed.weight", "blind.weight", "dead.weight", "idle.weight"}
    assert "used by embedding" in reasons["embed.weight"]
    assert "no_grad only" in reasons["blind.weight"]
    assert reasons["dead.weight"] == "no output depends on it"
    assert (
        reasons["idle.weight"]
        == "the example does not use it; compile with one that does, or without an example, to adapt it"
    )


def test_named_weights_of_other_operators_are_sites(prepare: Prepare) -> None:
    search = prepare(Zoo(), TOKENS, selection=SiteSelection(sites=("embed", "raw"))).search
    assert {site.name: site.op for site in search.sites} == {"embed.weight": "embedding", "raw": "linear"}
    assert "not selected" in search.rejected["linear.weight"]


def test_a_glob_that_matches_a_tied_name_selects_the_weight(prepare: Prepare) -> None:
    search = prepare(Zoo(), TOKENS, selection=SiteSelection(sites=("tied",))).search
    assert [site.name for site in search.sites] == ["linear.weight"]


@pytest.mark.parametrize(
    ("selection", "names"),
    [
        (SiteSelection(exclude=("raw",)), ["stacked", "linear.weight"]),
        (SiteSelection(trainable=("tied.*",)), ["raw", "stacked"]),
        (SiteSelection(sites="*.weight", exclude=("embed*", "blind*", "dead*", "idle*")), ["linear.weight"]),
    ],
    ids=["exclude", "trainable", "one glob as a string"],
)
def test_selections(prepare: Prepare, selection: SiteSelection, names: list[str]) -> None:
    assert [site.name for site in prepare(Zoo(), TOKENS, selection=selection).search.sites] == names


@pytest.mark.parametrize("option", ["sites", "exclude"])
def test_a_glob_that_matches_nothing_is_refused_with_the_existing_names(option: str) -> None:
    with pytest.raises(SiteError, match=rf"{option}='\*\.qurey' matches no weight, .*; there are: .*linear\.weight"):
        find_module_sites(Zoo(), SiteSelection(**{option: ("*.qurey",)}))  # type: ignore[arg-type]


def test_integer_weights_are_not_sites() -> None:
    module = nn.Linear(4, 4)
    module.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.int8), requires_grad=False)
    search = find_module_sites(module, SiteSelection())
    assert search.sites == ()
    assert "torch.int8" in search.rejected["weight"]


def test_module_sites_include_attention_but_not_embeddings() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)
            self.embed = nn.Embedding(7, 4)

    search = find_module_sites(Block(), SiteSelection())
    assert [site.name for site in search.sites] == ["attention.in_proj_weight", "attention.out_proj.weight"]
    assert "pass an example" in search.rejected["embed.weight"]


def test_graph_and_modules_agree_on_linear_layers(prepare: Prepare) -> None:
    module = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2))
    found = prepare(module, torch.randn(4, 3)).search.sites
    assert [site.role for site in found] == ["feed_forward.up", "head"]
    without_roles = tuple(dataclasses.replace(site, role="linear") for site in found)
    assert find_module_sites(module, SiteSelection()).sites == without_roles


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("a.query.weight", True), ("*.query", True), ("*.query.*", True), ("query", False), ("a", False)],
)
def test_globs_match_names_with_or_without_the_last_part(pattern: str, found: bool) -> None:
    assert (find_matching_glob(["a.query.weight"], (pattern,)) == pattern) is found


def test_functional_convolutions_and_slices(prepare: Prepare) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.kernel = nn.Parameter(torch.randn(5, 2, 3))
            self.packed = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            x = F.conv1d(x, self.kernel).transpose(1, 2)
            first, second = self.packed.chunk(2)
            return F.linear(x, first) * F.linear(x, second)

    module, x = Parts(), torch.randn(4, 2, 9)
    assert [site.name for site in prepare(module, x).search.sites] == ["packed"]
    search = prepare(module, x, selection=SiteSelection(sites=("kernel", "packed"))).search
    assert {site.name: site.op for site in search.sites} == {"kernel": "conv1d", "packed": "linear"}
    assert search.sites[0].in_features == 6


@pytest.mark.parametrize("sizes", [(0, 4), (4, 0)])
def test_a_weight_without_values_is_no_site(sizes: tuple[int, int]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of such a layer
        module = nn.ModuleDict({"empty": nn.Linear(*sizes), "full": nn.Linear(3, 4)})
    search = find_module_sites(module, SiteSelection())
    assert [site.name for site in search.sites] == ["full.weight"]
    assert search.rejected == {"empty.weight": "it has no values"}
