"""Every form gives the same ΔW on activations and on the weight, and is found by its name."""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph, GraphModule

from passes.base import SiteError
from passes.forms import FORMS, AdapterForm, NodeEmitter, find_form, with_offset

NAMES = [*FORMS, *(f"{name}-offset3" for name in FORMS)]


def draw(form: AdapterForm, out: int = 5, width: int = 4, rank: int = 2) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    shapes = form.parameter_shapes(out, width, rank)
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def build(form: AdapterForm, write: str, names: list[str]) -> GraphModule:
    graph = Graph()
    x, *inputs = (graph.placeholder(name) for name in ("x", *names))
    parameters = dict(zip(names, inputs, strict=True))
    emitter = NodeEmitter(after=inputs[-1], site="here")
    if write == "weight":
        out = form.emit_weight(emitter, parameters, 0.5)
    elif write == "factor":
        out = form.emit_factor(emitter, x, parameters, 0.5)
    else:
        out = form.emit_activation(emitter, x, parameters, 0.5, reverse=write == "reverse")
    assert all(node.meta["adapter_site"] == "here" for node in emitter.emitted)
    graph.output(out)
    return GraphModule(torch.nn.Module(), graph)


def exact_delta(name: str, p: dict[str, torch.Tensor]) -> torch.Tensor:
    """ΔW from the definition of the form."""
    if "svd" in name:
        delta = 0.5 * p["P"] @ torch.diag(p["lam"]) @ p["Q"]
        if "offset" in name:
            delta = delta - 0.5 * p["P_start"] @ torch.diag(p["lam_start"]) @ p["Q_start"]
        return delta
    delta = 0.5 * p["B"] @ p["A"]
    return delta - 0.5 * p["B_start"] @ p["A_start"] if "offset" in name else delta


@pytest.mark.parametrize("name", NAMES)
def test_activation_weight_and_delta_agree(name: str) -> None:
    form = find_form(name)
    p = draw(form)
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    delta = exact_delta(name, p)
    torch.testing.assert_close(form.delta(p, 0.5), delta)
    torch.testing.assert_close(build(form, "weight", list(p))(x, *p.values()), delta)
    torch.testing.assert_close(build(form, "forward", list(p))(x, *p.values()), x @ delta.t())
    torch.testing.assert_close(build(form, "reverse", list(p))(y, *p.values()), y @ delta)


@pytest.mark.parametrize("name", [name for name in NAMES if "dora" in name])
def test_the_factor_is_the_magnitude_over_the_norm_without_a_gradient_of_the_norm(name: str) -> None:
    form = find_form(name)
    assert form.rescales
    p = {key: value.requires_grad_() for key, value in draw(form).items()}
    weight = torch.randn(5, 4, dtype=torch.float64)
    total = weight + exact_delta(name, p)
    expected = p["magnitude"] / total.norm(dim=1)
    in_graph = build(form, "factor", list(p))(weight, *p.values())
    torch.testing.assert_close(in_graph, expected)
    torch.testing.assert_close(form.factor(total, p), expected)
    for factor in (in_graph, form.factor(total, p)):
        found = torch.autograd.grad(factor.sum(), list(p.values()), allow_unused=True)
        assert [key for key in p if found[list(p).index(key)].__class__ is torch.Tensor] == ["magnitude"]


def test_a_row_of_zeros_has_a_finite_factor() -> None:
    form = find_form("dora")
    p = draw(form) | {"B": torch.zeros(5, 2, dtype=torch.float64), "magnitude": torch.zeros(5, dtype=torch.float64)}
    weight = torch.zeros(5, 4, dtype=torch.float64)
    assert torch.equal(build(form, "factor", list(p))(weight, *p.values()), torch.zeros(5, dtype=torch.float64))
    assert torch.equal(form.factor(weight, p), torch.zeros(5, dtype=torch.float64))


@pytest.mark.parametrize("name", NAMES)
def test_forms_are_found_by_name(name: str) -> None:
    form = find_form(name)
    assert form.name == name
    assert form.core.name == name.removesuffix("-offset3")
    assert with_offset(form, 3).name == f"{form.core.name}-offset3"
    with pytest.raises(KeyError):
        find_form(name + "?")


@pytest.mark.parametrize("name", NAMES)
def test_starting_values_are_frozen_and_keep_their_rank(name: str) -> None:
    form = find_form(name)
    one, two = form.parameter_shapes(5, 4, 1), form.parameter_shapes(5, 4, 2)
    growing = {key for key in one if one[key] != two[key]}
    assert form.frozen == {key for key in one if key.endswith("_start")}
    assert growing == {key for key in one if key not in form.frozen and key != "magnitude"}
    assert form.is_empty(0) == (name in ("svd", "lora"))


@pytest.mark.parametrize(
    "name",
    ["lora-experts4", "svd-experts8-top2-example@a.0-b.weight", "lora-experts2-top1", "svd-masked@image_mask"],
)
def test_a_routed_form_is_found_by_its_name_and_multiplies_by_gates(name: str) -> None:
    form = find_form(name)
    assert form.name == name
    assert form.is_routed
    p = {key: value for key, value in draw(form, rank=8).items() if key != "router"}
    gates = torch.rand(3, form.groups, dtype=torch.float64)
    x, y = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    left, right = (p["B"], p["A"]) if name.startswith("lora") else (p["P"] * p["lam"], p["Q"])
    each = gates.repeat_interleave(8 // form.groups, 1)
    inputs = (*p.values(), gates)
    names = [*p, "gates"]
    torch.testing.assert_close(build(form, "forward", names)(x, *inputs), 0.5 * ((x @ right.T) * each) @ left.T)
    torch.testing.assert_close(build(form, "reverse", names)(y, *inputs), 0.5 * ((y @ left) * each) @ right)
    for refused in (lambda: form.delta(p, 0.5), lambda: build(form, "weight", list(p))):
        with pytest.raises(SiteError, match=r"depends on the call and is no matrix"):
            refused()


@pytest.mark.parametrize(
    "name", ["dora-experts4", "lora-experts1", "lora-experts4-top4", "lora-masked@", "svd-masked@1"]
)
def test_no_other_name_is_a_routed_form(name: str) -> None:
    with pytest.raises(KeyError):
        find_form(name)
