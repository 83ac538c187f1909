"""VerifyAdaptersPass accepts the graphs that insertion makes, and refuses graphs that break an invariant."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from passes.adapt.verify_adapters import VerifyAdaptersPass
from passes.base import PostconditionError
from passes.planning.plan import AdapterPlan

Prepare = Callable[..., Any]


@pytest.fixture
def bench(prepare: Prepare) -> Any:
    made = prepare(nn.Linear(3, 5), torch.randn(4, 3))
    made.insert(made.graph_module)
    return made


def test_an_adapted_graph_passes_unchanged(bench: Any) -> None:
    before = bench.codes()
    assert not VerifyAdaptersPass(plan=bench.plan)(bench.graph_module).modified
    assert bench.codes() == before


def test_an_unplanned_adapter_is_refused(bench: Any) -> None:
    with pytest.raises(PostconditionError, match="sites weight are adapted but not planned"):
        VerifyAdaptersPass(plan=AdapterPlan(adapters=()))(bench.graph_module)


def test_a_frozen_adapter_is_refused(bench: Any) -> None:
    bench.adapters.get_parameter("weight.lam").requires_grad_(False)
    with pytest.raises(PostconditionError, match=r"adapters\.weight\.lam does not require grad"):
        VerifyAdaptersPass(plan=bench.plan)(bench.graph_module)


def test_an_insertion_that_nothing_reads_is_refused(bench: Any) -> None:
    graph = bench.graph_module.graph
    total = next(node for node in graph.nodes if "adapter_replaces" in node.meta)
    total.replace_all_uses_with(total.args[0])
    with pytest.raises(PostconditionError, match="site weight: the adapted value add_tensor is never read"):
        VerifyAdaptersPass(plan=bench.plan)(bench.graph_module)
