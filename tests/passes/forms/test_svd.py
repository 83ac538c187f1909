"""The SVD form gives the same ΔW on activations, on the weight and as a tensor."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx import Graph, GraphModule, Node

from passes.forms import NodeEmitter, SvdForm


def build(form: SvdForm, write: str) -> GraphModule:
    graph = Graph()
    x, *inputs = (graph.placeholder(name) for name in ("x", "P", "lam", "Q"))
    parameters: dict[str, Node] = dict(zip(("P", "lam", "Q"), inputs, strict=True))
    emitter = NodeEmitter(after=inputs[-1], site="here")
    if write == "weight":
        out = form.emit_weight(emitter, parameters, 0.5)
    else:
        out = form.emit_activation(emitter, x, parameters, 0.5, reverse=write == "reverse")
    assert all(node.meta["adapter_site"] == "here" for node in emitter.emitted)
    assert emitter.emitted[-1] is out
    graph.output(out)
    return GraphModule(torch.nn.Module(), graph)


@settings(deadline=None, max_examples=25)
@given(out=st.integers(1, 7), width=st.integers(1, 7), rank=st.integers(1, 4), rows=st.integers(0, 3))
def test_activation_weight_and_delta_agree(out: int, width: int, rank: int, rows: int) -> None:
    form = SvdForm()
    generator = torch.Generator().manual_seed(out + 10 * width + 100 * rank)
    p = {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in form.parameter_shapes(out, width, rank).items()
    }
    delta = 0.5 * p["P"] @ torch.diag(p["lam"]) @ p["Q"]
    x = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    y = torch.randn(rows, out, generator=generator, dtype=torch.float64)
    arguments = (p["P"], p["lam"], p["Q"])
    torch.testing.assert_close(form.delta(p, 0.5), delta)
    torch.testing.assert_close(build(form, "weight")(x, *arguments), delta)
    torch.testing.assert_close(build(form, "forward")(x, *arguments), x @ delta.t())
    torch.testing.assert_close(build(form, "reverse")(y, *arguments), y @ delta)


@pytest.mark.parametrize("write", ["weight", "forward", "reverse"])
def test_zero_lambda_gives_exact_zeros(write: str) -> None:
    p, lam, q = torch.randn(4, 2), torch.zeros(2), torch.randn(2, 4)
    assert not build(SvdForm(), write)(torch.randn(3, 4), p, lam, q).any()
