"""Flat buffers: ordinary Parameters that are contiguous in memory, whatever is done to the module."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.parameters.flat_buffers import plan_layout
from tests.adapter_compiler.training.buffers import make_parameters, make_plan

SHAPES = ((5, 4, 3), (6, 2, 2), (5, 4, 3), (7, 4, 1))


def assert_joined(adapter_parameters: AdapterParameters) -> None:
    """Every parameter is a view of a flat buffer, and no two overlap."""
    assert adapter_parameters.flat is not None
    layout, buffers = adapter_parameters.flat
    views = layout.views(buffers)
    parameters = adapter_parameters.keyed_parameters
    assert views.keys() == parameters.keys()
    for key, parameter in parameters.items():
        assert parameter.data_ptr() == views[key].data_ptr()
        assert parameter.is_contiguous()
        assert parameter.is_leaf
        torch.testing.assert_close(parameter.detach(), views[key], rtol=0, atol=0)
    for buffer in buffers:
        buffer.zero_()
    for number, parameter in enumerate(parameters.values()):
        parameter.data.fill_(number + 1)
    for number, parameter in enumerate(parameters.values()):
        assert parameter.eq(number + 1).all()


def test_names_and_layout() -> None:
    adapter_parameters = make_parameters(SHAPES)
    assert [name for name, _ in adapter_parameters.named_parameters()][:4] == [
        "0.weight.P",
        "0.weight.lam",
        "0.weight.Q",
        "1.weight.P",
    ]
    assert adapter_parameters.flat is not None
    layout, (buffer,) = adapter_parameters.flat
    assert layout.buffers[0].lam == 3 + 2 + 3 + 1
    lam = torch.cat([adapter_parameters.get_parameter(f"{i}.weight.lam").detach() for i in range(4)])
    torch.testing.assert_close(buffer[: len(lam)], lam, rtol=0, atol=0)
    stacked = {(stack.name, stack.shape): len(stack.keys) for stack in layout.stacks if stack.name != "lam"}
    assert stacked == {
        ("P", (5, 3)): 2,
        ("P", (6, 2)): 1,
        ("P", (7, 1)): 1,
        ("Q", (3, 4)): 2,
        ("Q", (2, 2)): 1,
        ("Q", (1, 4)): 1,
    }
    assert all(stack.offset % 16 == 0 for stack in layout.stacks if stack.name != "lam")
    assert_joined(adapter_parameters)


def test_a_dtype_a_buffer() -> None:
    parameters = {
        ("a", "P"): torch.zeros(4, 2),
        ("b", "P"): torch.zeros(4, 2, dtype=torch.float64),
        ("c", "P"): torch.zeros(4, 2),
    }
    layout = plan_layout(parameters, {("a", "P"): 0, ("a", "lam"): 0, ("b", "P"): 0, ("c", "P"): 1})
    assert [(b.dtype, b.family) for b in layout.buffers] == [(torch.float32, 0), (torch.float64, 0), (torch.float32, 1)]
    assert layout.select(1).stacks[0].keys == (("c", "P"),)


@pytest.mark.parametrize("how", ["double", "float", "deepcopy", "pickle", "load", "save"])
def test_stays_joined(how: str) -> None:
    adapter_parameters = make_parameters(SHAPES)
    before = {name: p.detach().clone() for name, p in adapter_parameters.named_parameters()}
    same = dict(adapter_parameters.named_parameters())
    if how in ("double", "float"):
        adapter_parameters = adapter_parameters.to(getattr(torch, {"double": "float64", "float": "float32"}[how]))
        assert all(p is same[name] for name, p in adapter_parameters.named_parameters())
    elif how == "deepcopy":
        adapter_parameters = copy.deepcopy(adapter_parameters)
    elif how == "pickle":
        adapter_parameters = pickle.loads(pickle.dumps(adapter_parameters))
    elif how == "save":
        file = io.BytesIO()
        torch.save(adapter_parameters.state_dict(), file)
        file.seek(0)
        adapter_parameters = AdapterParameters(
            make_plan(SHAPES), {f"{i}.weight": torch.device("cpu") for i in range(4)}
        )
        adapter_parameters.load_state_dict(torch.load(file))
    else:
        adapter_parameters.load_state_dict({name: value.clone() for name, value in before.items()})
    for name, parameter in adapter_parameters.named_parameters():
        torch.testing.assert_close(parameter.detach().double(), before[name], rtol=1e-6, atol=1e-6)
    assert_joined(adapter_parameters)


def test_a_copy_shares_nothing() -> None:
    adapter_parameters = make_parameters(SHAPES)
    copied = copy.deepcopy(adapter_parameters)
    copied.get_parameter("0.weight.P").data.zero_()
    assert adapter_parameters.get_parameter("0.weight.P").ne(0).any()


def test_memory_taken_from_outside_is_noticed() -> None:
    adapter_parameters = make_parameters(SHAPES)
    parameter = adapter_parameters.get_parameter("1.weight.Q")
    parameter.data = parameter.data.clone()
    assert adapter_parameters.flat is None
    adapter_parameters = make_parameters(SHAPES)
    adapter_parameters.get_submodule("1.weight").register_parameter(
        "Q", nn.Parameter(torch.randn(2, 2, dtype=torch.float64))
    )
    assert adapter_parameters.flat is None


def test_resizing_keeps_the_parameter_and_forgets_its_old_shape_in_autograd() -> None:
    adapter_parameters = make_parameters(SHAPES)
    P = adapter_parameters.get_parameter("0.weight.P")
    old = (P * 2).sum()
    old.backward()  # the graph of ``old`` still exists, so autograd remembers the old shape of P
    adapter_parameters.resize({("0.weight", "P"): torch.ones(5, 1, dtype=torch.float64)})
    assert adapter_parameters.get_parameter("0.weight.P") is P
    assert P.grad is None
    (P * 3).sum().backward()
    assert P.grad is not None and P.grad.tolist() == [[3.0]] * 5
    assert_joined(adapter_parameters)


def test_empty_parameters_are_in_the_layout() -> None:
    adapter_parameters = make_parameters(((5, 4, 0), (5, 4, 2)))
    assert adapter_parameters.get_parameter("0.weight.P").shape == (5, 0)
    assert_joined(adapter_parameters)
