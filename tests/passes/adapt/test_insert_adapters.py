"""Golden graphs of InsertAdaptersPass, the number of nodes that it adds, and what it refuses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from passes.base import PreconditionError, find_graph_modules
from passes.planning.plan import AdapterPlan
from passes.planning.selection import SiteSelection

Prepare = Callable[..., Any]

NAMED = SiteSelection(sites=("weight",))


class Weighted(nn.Module):
    """One weight, an optional bias, and a function that uses them."""

    def __init__(
        self, use: Callable[[Weighted, Tensor], Tensor], shape: tuple[int, ...], bias: int | None = None
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = None if bias is None else nn.Parameter(torch.randn(bias))
        self.use = use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self, x)


def add_bias(w: Weighted, y: Tensor) -> Tensor:
    assert w.bias is not None
    return y + w.bias


def addmm(w: Weighted, x: Tensor, weight: Tensor, alpha: float = 1) -> Tensor:
    assert w.bias is not None
    return torch.addmm(w.bias, x, weight, alpha=alpha)


FETCH = """\
def forward(self, tensors_0):
adapters_weight_p = self.adapters.weight.P
adapters_weight_lam = self.adapters.weight.lam
adapters_weight_q = self.adapters.weight.Q
module_weight = self.module.weight
"""
BIAS = "module_bias = self.module.bias\n"
ON_WEIGHT = """\
mul_tensor = aten.mul.Tensor(adapters_weight_lam, 0.5)
mul_tensor_1 = aten.mul.Tensor(adapters_weight_p, mul_tensor)
matmul_default = aten.matmul.default(mul_tensor_1, adapters_weight_q)
add_tensor = aten.add.Tensor(module_weight, matmul_default)
"""


def on_activations(output: str) -> str:
    return f"""\
mul_tensor = aten.mul.Tensor(adapters_weight_lam, 0.5)
linear_default = aten.linear.default(tensors_0, adapters_weight_q)
mul_tensor_1 = aten.mul.Tensor(linear_default, mul_tensor)
linear_default_1 = aten.linear.default(mul_tensor_1, adapters_weight_p)
add_tensor = aten.add.Tensor({output}, linear_default_1)
"""


#: name → module, the graph after insertion
ACTIVATION_FORM: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "nn.Linear": (
        lambda: nn.Linear(3, 5),
        FETCH
        + BIAS
        + "linear = aten.linear.default(tensors_0, module_weight, module_bias)\n"
        + on_activations("linear")
        + "return (add_tensor,)",
    ),
    "nn.Linear without bias": (
        lambda: nn.Linear(3, 5, bias=False),
        FETCH
        + "linear = aten.linear.default(tensors_0, module_weight)\n"
        + on_activations("linear")
        + "return (add_tensor,)",
    ),
    "F.linear on a raw Parameter": (
        lambda: Weighted(lambda w, x: F.linear(x, w.weight, w.bias), (5, 3), 5),
        FETCH
        + BIAS
        + "linear = aten.linear.default(tensors_0, module_weight, module_bias)\n"
        + on_activations("linear")
        + "return (add_tensor,)",
    ),
    "matmul": (
        lambda: Weighted(lambda w, x: x @ w.weight, (3, 5)),
        FETCH
        + "matmul = aten.matmul.default(tensors_0, module_weight)\n"
        + on_activations("matmul")
        + "return (add_tensor,)",
    ),
    "matmul with transpose and bias": (
        lambda: Weighted(lambda w, x: add_bias(w, x @ w.weight.t()), (5, 3), 5),
        FETCH
        + BIAS
        + "t = aten.t.default(module_weight)\n"
        + "matmul = aten.matmul.default(tensors_0, t)\n"
        + on_activations("matmul")
        + "add = aten.add.Tensor(add_tensor, module_bias)\nreturn (add,)",
    ),
    "matmul with transpose(0, 1)": (
        lambda: Weighted(lambda w, x: x @ w.weight.transpose(0, 1), (5, 3)),
        FETCH
        + "transpose = aten.transpose.int(module_weight, 0, 1)\n"
        + "matmul = aten.matmul.default(tensors_0, transpose)\n"
        + on_activations("matmul")
        + "return (add_tensor,)",
    ),
    "mm": (
        lambda: Weighted(lambda w, x: torch.mm(x, w.weight), (3, 5)),
        FETCH + "mm = aten.mm.default(tensors_0, module_weight)\n" + on_activations("mm") + "return (add_tensor,)",
    ),
    "addmm": (
        lambda: Weighted(lambda w, x: addmm(w, x, w.weight), (3, 5), 5),
        FETCH
        + BIAS
        + "addmm = aten.addmm.default(module_bias, tensors_0, module_weight)\n"
        + on_activations("addmm")
        + "return (add_tensor,)",
    ),
    "addmm with transpose": (
        lambda: Weighted(lambda w, x: addmm(w, x, w.weight.T), (5, 3), 5),
        FETCH
        + BIAS
        + "numpy_t = aten.numpy_T.default(module_weight)\n"
        + "addmm = aten.addmm.default(module_bias, tensors_0, numpy_t)\n"
        + on_activations("addmm")
        + "return (add_tensor,)",
    ),
}

#: name → module, example, the graph after insertion, number of nodes added
WEIGHT_FORM: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, int]] = {
    "sliced": (
        lambda: Weighted(lambda w, x: F.linear(x, w.weight[:2]), (5, 3)),
        lambda: torch.randn(4, 3),
        FETCH
        + ON_WEIGHT
        + "slice_1 = aten.slice.Tensor(add_tensor, 0, 0, 2)\n"
        + "linear = aten.linear.default(tensors_0, slice_1)\nreturn (linear,)",
        7,
    ),
    "the left factor": (
        lambda: Weighted(lambda w, x: w.weight @ x, (5, 3)),
        lambda: torch.randn(3, 4),
        FETCH + ON_WEIGHT + "matmul = aten.matmul.default(add_tensor, tensors_0)\nreturn (matmul,)",
        7,
    ),
    "addmm with alpha": (
        lambda: Weighted(lambda w, x: addmm(w, x, w.weight, alpha=2.0), (3, 5), 5),
        lambda: torch.randn(4, 3),
        FETCH
        + ON_WEIGHT
        + BIAS
        + "addmm = aten.addmm.default(module_bias, tensors_0, add_tensor, alpha = 2.0)\nreturn (addmm,)",
        7,
    ),
    "einsum": (
        lambda: Weighted(lambda w, x: torch.einsum("bi,oi->bo", x, w.weight), (5, 3)),
        lambda: torch.randn(4, 3),
        FETCH + ON_WEIGHT + "einsum = aten.einsum.default('bi,oi->bo', [tensors_0, add_tensor])\nreturn (einsum,)",
        7,
    ),
    "grouped conv1d": (
        lambda: nn.Conv1d(4, 6, 3, groups=2, bias=False),
        lambda: torch.randn(4, 4, 9),
        FETCH
        + ON_WEIGHT.replace(
            "add_tensor = aten.add.Tensor(module_weight, matmul_default)",
            "reshape_default = aten.reshape.default(matmul_default, [6, 2, 3])\n"
            "add_tensor = aten.add.Tensor(module_weight, reshape_default)",
        )
        + "conv1d = aten.conv1d.default(tensors_0, add_tensor, None, [1], [0], [1], 2)\nreturn (conv1d,)",
        8,
    ),
}

#: Look-ups and convolutions: name → module, example, the graph after insertion, number of nodes added
OTHER_ACTIVATION_FORM: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str, int]] = {
    "embedding": (
        lambda: nn.Embedding(7, 3),
        lambda: torch.randint(0, 7, (4, 2)),
        FETCH
        + """\
embedding = aten.embedding.default(module_weight, tensors_0)
mul_tensor = aten.mul.Tensor(adapters_weight_lam, 0.5)
embedding_default = aten.embedding.default(adapters_weight_p, tensors_0)
mul_tensor_1 = aten.mul.Tensor(embedding_default, mul_tensor)
matmul_default = aten.matmul.default(mul_tensor_1, adapters_weight_q)
add_tensor = aten.add.Tensor(embedding, matmul_default)
return (add_tensor,)""",
        8,
    ),
    "embedding with a padding row": (
        lambda: nn.Embedding(7, 3, padding_idx=2),
        lambda: torch.randint(0, 7, (4, 2)),
        FETCH
        + """\
embedding = aten.embedding.default(module_weight, tensors_0, 2)
mul_tensor = aten.mul.Tensor(adapters_weight_lam, 0.5)
embedding_default = aten.embedding.default(adapters_weight_p, tensors_0, 2)
mul_tensor_1 = aten.mul.Tensor(embedding_default, mul_tensor)
matmul_default = aten.matmul.default(mul_tensor_1, adapters_weight_q)
eq_scalar = aten.eq.Scalar(tensors_0, 2)
unsqueeze_default = aten.unsqueeze.default(eq_scalar, -1)
detach_default = aten.detach.default(matmul_default)
where_self = aten.where.self(unsqueeze_default, detach_default, matmul_default)
add_tensor = aten.add.Tensor(embedding, where_self)
return (add_tensor,)""",
        12,
    ),
    "conv1d": (
        lambda: nn.Conv1d(2, 5, 3, bias=False, stride=2),
        lambda: torch.randn(4, 2, 9),
        FETCH
        + """\
conv1d = aten.conv1d.default(tensors_0, module_weight, None, [2])
mul_tensor = aten.mul.Tensor(adapters_weight_lam, 0.5)
reshape_default = aten.reshape.default(adapters_weight_q, [-1, 2, 3])
reshape_default_1 = aten.reshape.default(adapters_weight_p, [5, -1, 1])
reshape_default_2 = aten.reshape.default(mul_tensor, [-1, 1])
conv1d_default = aten.conv1d.default(tensors_0, reshape_default, None, [2])
mul_tensor_1 = aten.mul.Tensor(conv1d_default, reshape_default_2)
conv1d_default_1 = aten.conv1d.default(mul_tensor_1, reshape_default_1)
add_tensor = aten.add.Tensor(conv1d, conv1d_default_1)
return (add_tensor,)""",
        11,
    ),
}


def assert_inserts(bench: Any, golden: str, added: int) -> None:
    """Check the golden graph, the counts, that a second run changes nothing, and that folding undoes it."""
    before, nodes = bench.codes(), bench.count_nodes()
    assert bench.count_tagged() == 0
    assert bench.insert(bench.graph_module).modified
    assert bench.print() == golden
    assert bench.count_nodes() - nodes == bench.count_tagged() == added
    assert not bench.insert(bench.graph_module).modified
    assert bench.count_tagged() == added
    assert bench.fold(bench.graph_module).modified
    assert bench.codes() == before
    assert bench.count_tagged() == 0
    assert not bench.fold(bench.graph_module).modified


@pytest.mark.parametrize("name", ACTIVATION_FORM)
def test_whole_weight_of_a_product_is_adapted_on_activations(prepare: Prepare, name: str) -> None:
    make, golden = ACTIVATION_FORM[name]
    bench = prepare(make(), torch.randn(4, 3))
    assert [site.op for site in bench.search.sites] == ["linear"]
    assert_inserts(bench, golden, added=8)


@pytest.mark.parametrize("name", WEIGHT_FORM)
def test_other_uses_are_adapted_on_the_weight(prepare: Prepare, name: str) -> None:
    make, example, golden, added = WEIGHT_FORM[name]
    assert_inserts(prepare(make(), example(), selection=NAMED), golden, added)


@pytest.mark.parametrize("name", OTHER_ACTIVATION_FORM)
def test_lookups_and_convolutions_are_adapted_on_activations(prepare: Prepare, name: str) -> None:
    make, example, golden, added = OTHER_ACTIVATION_FORM[name]
    assert_inserts(prepare(make(), example(), selection=NAMED), golden, added)


@pytest.mark.parametrize(
    ("make", "example"),
    [
        (lambda: nn.Embedding(7, 3), lambda: torch.randint(0, 7, (4, 2))),
        (lambda: nn.Embedding(7, 3, padding_idx=2), lambda: torch.arange(7).repeat(2, 1)),
        (lambda: nn.Conv1d(2, 5, 3, dilation=2), lambda: torch.randn(4, 2, 9)),
        (lambda: nn.Conv2d(2, 5, (3, 2), padding="same"), lambda: torch.randn(2, 8, 7)),
        (lambda: nn.Conv2d(3, 5, 1, stride=2), lambda: torch.randn(4, 3, 8, 7)),
        (lambda: nn.Conv3d(2, 4, 3, padding=1), lambda: torch.randn(2, 2, 4, 5, 6)),
        (lambda: nn.Conv2d(2, 5, 3, padding=1, padding_mode="circular"), lambda: torch.randn(2, 2, 6, 6)),
    ],
)
def test_lookups_and_convolutions_compute_with_effective_weights(
    prepare: Prepare, make: Callable[[], nn.Module], example: Callable[[], Tensor]
) -> None:
    module, x = make().double(), example()
    x = x.double() if x.is_floating_point() else x
    bench = prepare(module, x, selection=NAMED)
    bench.randomize()
    bench.insert(bench.graph_module)
    assert bench.count_tagged()
    (adapter,) = bench.plan
    parameters = dict(bench.adapters.get_submodule("weight").named_parameters())
    weight = module.get_parameter("weight").detach() + adapter.delta(parameters)
    expected = torch.func.functional_call(module, {"weight": weight}, (x,))
    found = bench.graph_module(x)[0]
    torch.testing.assert_close(found, expected)
    loss = expected.detach().cos()
    wanted = torch.autograd.grad((expected * loss).sum(), list(parameters.values()))
    torch.testing.assert_close(torch.autograd.grad((found * loss).sum(), list(parameters.values())), wanted)


def test_a_weight_used_in_both_directions_reverses_the_adapter(prepare: Prepare) -> None:
    bench = prepare(Weighted(lambda w, x: F.linear(x @ w.weight, w.weight), (3, 5)), torch.randn(4, 3))
    golden = (
        FETCH
        + "matmul = aten.matmul.default(tensors_0, module_weight)\n"
        + on_activations("matmul")
        + """\
linear = aten.linear.default(add_tensor, module_weight)
mul_tensor_2 = aten.mul.Tensor(adapters_weight_lam, 0.5)
matmul_default = aten.matmul.default(add_tensor, adapters_weight_p)
mul_tensor_3 = aten.mul.Tensor(matmul_default, mul_tensor_2)
matmul_default_1 = aten.matmul.default(mul_tensor_3, adapters_weight_q)
add_tensor_1 = aten.add.Tensor(linear, matmul_default_1)
return (add_tensor_1,)"""
    )
    assert_inserts(bench, golden, added=13)


def test_an_adapter_reads_the_output_of_the_adapter_before_it(prepare: Prepare) -> None:
    """Also where the plan's order is not that of the calls: the last layer is registered before the first one."""

    class Chained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(3, 2, bias=False)
            self.first = nn.Linear(4, 3, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.last(self.first(x))
            return y

    bench = prepare(Chained(), torch.randn(5, 4))
    bench.insert(bench.graph_module)
    inputs = {
        str(node.args[0]) for node in bench.graph_module.graph.nodes if str(node.args[1:2]) == "(module_last_weight,)"
    }
    inputs |= {
        str(node.args[0])
        for node in bench.graph_module.graph.nodes
        if str(node.args[1:2]) == "(adapters_last_weight_q,)"
    }
    assert len(inputs) == 1
    assert "add_tensor" in inputs.pop()


class NoGrad(nn.Module):
    """A linear layer that is used inside no_grad and outside, where it gets a gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            blind = self.l(x)
        y: Tensor = self.l(x + blind)
        return y


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y: Tensor = self.l(x)
        return y.float()


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l = nn.Linear(3, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.l, x, use_reentrant=False)
        return y


FETCH_L = """\
def forward(self, tensors_0):
adapters_l_weight_p = self.adapters.l.weight.P
adapters_l_weight_lam = self.adapters.l.weight.lam
adapters_l_weight_q = self.adapters.l.weight.Q
module_l_weight = self.module.l.weight
"""
NO_GRAD = (
    FETCH_L
    + """\
submod_3 = self.submod_1
linear = higher_order.wrap_with_set_grad_enabled(False, submod_3, tensors_0, module_l_weight, \
adapters_l_weight_p, adapters_l_weight_lam, adapters_l_weight_q)
getitem = linear[0]
add = aten.add.Tensor(tensors_0, getitem)
linear_1 = aten.linear.default(add, module_l_weight)
mul_tensor = aten.mul.Tensor(adapters_l_weight_lam, 0.5)
linear_default = aten.linear.default(add, adapters_l_weight_q)
mul_tensor_1 = aten.mul.Tensor(linear_default, mul_tensor)
linear_default_1 = aten.linear.default(mul_tensor_1, adapters_l_weight_p)
add_tensor = aten.add.Tensor(linear_1, linear_default_1)
return (add_tensor,)
def forward(self, tensors_0, p_module_l_weight, adapters_l_weight_p, adapters_l_weight_lam, adapters_l_weight_q):
linear = aten.linear.default(tensors_0, p_module_l_weight)
mul_tensor = aten.mul.Tensor(adapters_l_weight_lam, 0.5)
linear_default = aten.linear.default(tensors_0, adapters_l_weight_q)
mul_tensor_1 = aten.mul.Tensor(linear_default, mul_tensor)
linear_default_1 = aten.linear.default(mul_tensor_1, adapters_l_weight_p)
add_tensor = aten.add.Tensor(linear, linear_default_1)
return (add_tensor,)"""
)
AUTOCAST = (
    FETCH_L
    + """\
submod_3 = self.submod_1
linear = higher_order.wrap_with_autocast('cpu', torch.bfloat16, True, False, submod_3, tensors_0, module_l_weight, \
adapters_l_weight_p, adapters_l_weight_lam, adapters_l_weight_q)
getitem = linear[0]
to = aten.to.dtype(getitem, torch.float32)
return (to,)
def forward(self, arg1_1, arg0_1, adapters_l_weight_p, adapters_l_weight_lam, adapters_l_weight_q):
linear = aten.linear.default(arg1_1, arg0_1)
mul_tensor = aten.mul.Tensor(adapters_l_weight_lam, 0.5)
linear_default = aten.linear.default(arg1_1, adapters_l_weight_q)
mul_tensor_1 = aten.mul.Tensor(linear_default, mul_tensor)
linear_default_1 = aten.linear.default(mul_tensor_1, adapters_l_weight_p)
type_as_default = aten.type_as.default(linear_default_1, linear)
add_tensor = aten.add.Tensor(linear, type_as_default)
return (add_tensor,)"""
)
CHECKPOINTED = (
    FETCH_L
    + "linear = aten.linear.default(tensors_0, module_l_weight)\n"
    + on_activations("linear").replace("adapters_weight", "adapters_l_weight")
    + "return (add_tensor,)"
)


@pytest.mark.parametrize(
    ("module", "golden", "added"),
    [(NoGrad, NO_GRAD, 16), (Autocast, AUTOCAST, 12), (Checkpointed, CHECKPOINTED, 8)],
    ids=["no_grad", "autocast", "checkpoint"],
)
def test_adapters_are_inserted_in_regions(prepare: Prepare, module: type[nn.Module], golden: str, added: int) -> None:
    assert_inserts(prepare(module(), torch.randn(4, 3)), golden, added)


def test_tags_name_the_site_and_what_was_replaced(prepare: Prepare) -> None:
    bench = prepare(nn.Linear(3, 5), torch.randn(4, 3))
    bench.insert(bench.graph_module)
    added = [node for node in bench.graph_module.graph.nodes if "adapter_site" in node.meta]
    assert {node.meta["adapter_site"] for node in added} == {"weight"}
    assert [node.meta["adapter_replaces"] for node in added if "adapter_replaces" in node.meta] == ["linear"]
    assert "adapter_replaces" in added[-1].meta


def test_half_precision_weights_with_wider_adapters_cast_both_ways(prepare: Prepare) -> None:
    module = nn.Linear(3, 5, bias=False).to(torch.bfloat16)
    bench = prepare(module, torch.randn(4, 3, dtype=torch.bfloat16), dtype=torch.float32)
    golden = (
        FETCH
        + """\
linear = aten.linear.default(tensors_0, module_weight)
to_dtype = aten.to.dtype(tensors_0, torch.float32)
mul_tensor = aten.mul.Tensor(adapters_weight_lam, 0.5)
linear_default = aten.linear.default(to_dtype, adapters_weight_q)
mul_tensor_1 = aten.mul.Tensor(linear_default, mul_tensor)
linear_default_1 = aten.linear.default(mul_tensor_1, adapters_weight_p)
type_as_default = aten.type_as.default(linear_default_1, linear)
add_tensor = aten.add.Tensor(linear, type_as_default)
return (add_tensor,)"""
    )
    assert_inserts(bench, golden, added=10)


def test_zero_lambda_changes_nothing_and_other_values_follow_the_formula(prepare: Prepare) -> None:
    module, x = nn.Linear(3, 5), torch.randn(4, 3)
    bench = prepare(module, x)
    (before,) = bench.graph_module(x)
    bench.insert(bench.graph_module)
    (after,) = bench.graph_module(x)
    assert torch.equal(before, after)
    bench.randomize()
    p = dict(bench.adapters.named_parameters())
    delta = 0.5 * p["weight.P"] @ torch.diag(p["weight.lam"]) @ p["weight.Q"]
    (adapted,) = bench.graph_module(x)
    torch.testing.assert_close(adapted, F.linear(x, module.weight + delta, module.bias), rtol=1e-5, atol=1e-6)


def test_a_graph_without_the_adapters_parameters_is_refused(prepare: Prepare) -> None:
    bench = prepare(nn.Linear(3, 5), torch.randn(4, 3))
    del bench.graph_module.adapters
    with pytest.raises(PreconditionError, match=r"site weight: the graph module has no parameter adapters\.weight\.P"):
        bench.insert(bench.graph_module)


def test_a_plan_for_another_shape_is_refused_before_any_edit(prepare: Prepare) -> None:
    bench = prepare(nn.Linear(3, 5), torch.randn(4, 3))
    (adapter,) = bench.plan
    other = dataclasses.replace(adapter, site=dataclasses.replace(adapter.site, shape=(5, 4)))
    insert = dataclasses.replace(bench.insert, plan=AdapterPlan(adapters=(other,)))
    before = bench.codes()
    with pytest.raises(PreconditionError, match=r"has shape \(5, 3\), the plan expects \(5, 4\)"):
        insert(bench.graph_module)
    assert bench.codes() == before


def test_every_region_lints_after_insertion(prepare: Prepare) -> None:
    bench = prepare(NoGrad(), torch.randn(4, 3))
    bench.insert(bench.graph_module)
    bodies = find_graph_modules(bench.graph_module)
    assert len(bodies) == 2
    for body in bodies:
        body.graph.lint()
