"""Which weights ``sites="auto"`` selects."""

from __future__ import annotations

import pytest
import torch

from passes.planning.rules import AdapterRule
from passes.planning.selection import SiteSelection
from passes.planning.site import AdapterSite

AUTO = SiteSelection(sites="auto")


def make_site(op: str, rows: int = 16) -> AdapterSite:
    return AdapterSite(name="layer.weight", shape=(rows, 4), dtype=torch.float32, op=op)


@pytest.mark.parametrize(
    "op",
    ["linear", "conv1d", "conv2d", "conv_transpose2d", "lstm", "gru_cell", "rnn_tanh", "embedding", "embedding_bag"],
)
def test_known_kinds_are_selected(op: str) -> None:
    assert AUTO.find_reason_against_site(make_site(op), None) is None


@pytest.mark.parametrize(("rows", "is_chosen"), [(7, False), (8, True), (10_000, True), (10_001, False)])
def test_tables_have_a_sensible_size(rows: int, is_chosen: bool) -> None:
    reason = AUTO.find_reason_against_site(make_site("embedding", rows), None)
    assert (reason is None) == is_chosen
    assert is_chosen or reason == (
        f"a table of {rows:,} rows, sites='auto' takes 8 to 10,000 (name it in sites to adapt it)"
    )


def test_other_operators_are_left_out() -> None:
    reason = AUTO.find_reason_against_site(make_site("bilinear"), None)
    assert reason == "used by bilinear, which sites='auto' leaves out (name it in sites to adapt it)"
    assert AUTO.find_reason_against_site(make_site("bilinear"), AdapterRule(op="bilinear")) is None


def test_auto_is_no_glob() -> None:
    AUTO.assert_globs_match(["layer.weight"])
