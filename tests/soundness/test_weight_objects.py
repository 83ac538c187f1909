"""Weights as objects: written from themselves, kept, compared, tied, hooked, computed by parametrizations later on."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.flop_counter import FlopCounterMode

from adapter_compiler.errors import SiteError
from tests.soundness.common import EVAL, LARGE, TRAIN, WATCHED, WIDTH, Run, Situation, adapt, make, params, seed
from tests.soundness.oracle import Oracle, assert_close, check


def compute(net: Any, x: Tensor) -> Any:
    return net.second(torch.tanh(net.first(x)))


def renormalize_data(net: Any, x: Tensor) -> Any:
    """EEGNet keeps the rows of a weight short, at every call."""
    net.first.weight.data = torch.renorm(net.first.weight.data, 2, 0, 0.5)
    return net.second(net.first(x))


def normalize_by_copy(net: Any, x: Tensor) -> Any:
    with torch.no_grad():
        net.first.weight.copy_(F.normalize(net.first.weight))
    return net.second(net.first(x))


def normalize_data_by_copy(net: Any, x: Tensor) -> Any:
    net.first.weight.data.copy_(F.normalize(net.first.weight.data))
    return net.second(net.first(x))


def clamp_data(net: Any, x: Tensor) -> Any:
    net.first.weight.data.clamp_(-0.2, 0.2)
    return net.second(net.first(x))


def keep_weight(net: Any, x: Tensor) -> Any:
    net.kept = net.first.weight
    return net.second(F.linear(x, net.kept))


def keep_weight_in_a_list(net: Any, x: Tensor) -> Any:
    net.kept = getattr(net, "kept", [net.first.weight])
    return net.second(F.linear(x, net.kept[0]))


def gradient_of_a_weight(net: Any, x: Tensor) -> Any:
    """A step of gradient descent inside forward."""
    weight = net.first.weight
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(F.linear(x, weight).square().sum(), weight, create_graph=True)
    return net.second(F.linear(x, weight - 0.1 * gradient))


def hook_on_a_weight(net: Any, x: Tensor) -> Any:
    """The hook of the call before is taken away: a Parameter keeps its hooks."""
    weight = net.first.weight
    for handle in net.table.pop("handles", []):
        handle.remove()
    if weight.requires_grad:
        net.table["handles"] = [weight.register_hook(lambda gradient: gradient * 2)]
    return net.second(F.linear(x, weight))


def hook_on_a_part_of_a_weight(net: Any, x: Tensor) -> Any:
    rows = net.first.weight[2:5]
    if rows.requires_grad:
        rows.register_hook(lambda gradient: gradient * 2)
    return net.second(x) + F.linear(x, rows).sum()


def same_object(net: Any, x: Tensor) -> Any:
    return net.first(x) * (2 if net.first.weight is net.first.weight else 1)


def tied_object(net: Any, x: Tensor) -> Any:
    net.table["weights"] = {id(net.first.weight), id(net.second.weight), id(net.first.weight)}
    return net.first(x) * len(net.table["weights"])


def key_of_a_dictionary(net: Any, x: Tensor) -> Any:
    seen = {net.first.weight: 1.0}
    return net.second(net.first(x)) * seen.get(net.first.weight, 5.0)


def copy_of_a_layer(net: Any, x: Tensor) -> Any:
    return copy.copy(net.first)(x) + copy.deepcopy(net.second)(x)


def another_of_the_class(net: Any, x: Tensor) -> Any:
    other = type(net.first)(WIDTH, WIDTH)
    other.load_state_dict({"weight": net.first.weight.detach(), "bias": net.first.bias.detach()})
    return net.second(other(x))


def fused_copy(net: Any, x: Tensor) -> Any:
    """As torch.nn.utils.fuse_linear_bn_eval does it: another weight in a copy of the layer."""
    fused = copy.deepcopy(net.first)
    fused.weight = nn.Parameter(net.first.weight.detach() * 2, requires_grad=False)
    return net.second(fused(x))


def nested(layout: torch.layout) -> Callable[[Any, Tensor], Any]:
    def run(net: Any, x: Tensor) -> Any:
        y = net.first(torch.nested.as_nested_tensor([x[:1], x * 2], layout=layout))
        return torch.nested.to_padded_tensor(y, 0.0)

    return run


def double_data(net: Any) -> None:
    net.first.weight.data = net.first.weight.data * 2


def double_parameter(net: Any) -> None:
    net.first.weight = nn.Parameter(net.first.weight.detach() * 2)


def assign_itself(net: Any) -> None:
    net.first.weight = net.first.weight


def tie(net: Any) -> None:
    net.second.weight = net.first.weight


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


def seeded(change: Callable[[Any], object]) -> Callable[[Any], None]:
    def run(net: Any) -> None:
        seed(23)
        change(net)

    return run


#: The adapters do not train any more then.
LATER: dict[str, Callable[[Any], object]] = {
    "pruned": lambda net: prune.l1_unstructured(net.first, "weight", 0.5),
    "weight-norm": lambda net: parametrizations.weight_norm(net.first),
    "parametrized": lambda net: parametrize.register_parametrization(net.first, "weight", Symmetric()),
    "old-weight-norm": lambda net: torch.nn.utils.weight_norm(net.first),
}

AUTOCAST: dict[str, Callable[[Tensor, Any], Any]] = {
    "matmul": lambda x, w: x @ w,
    "matmul-transposed": lambda x, w: x @ w.T,
    "linear": lambda x, w: F.linear(x, w),
    "rows": lambda x, w: F.linear(x, w[2:5]),
    "einsum": lambda x, w: torch.einsum("bi,io->bo", x, w),
    "addmm": lambda x, w: torch.addmm(x[0], x, w),
    "bmm": lambda x, w: torch.bmm(x[None], w[None]),
    "square": lambda x, w: x @ (w @ w),
    "convolution": lambda x, w: F.conv1d(x[None].mT, w[..., None]),
    "lookup": lambda x, w: F.embedding(torch.tensor([1, 2]), w) + 0,
}


def raw(use: Callable[[Tensor, Any], Any]) -> Callable[[], nn.Module]:
    return make(lambda net, x: use(net.first(x), net.raw))


def of(name: str, run: Callable[..., Any], **options: Any) -> Situation:
    return Situation(name=name, **{"build": make(run), "runs": (EVAL, TRAIN, LARGE), **options})


TABLE = [
    of("renormalized-data", renormalize_data),
    of("normalized-by-copy", normalize_by_copy),
    of("normalized-data-by-copy", normalize_data_by_copy),
    of("clamped-data", clamp_data),
    of("data-from-itself", compute, change=double_data),
    of("parameter-from-itself", compute, change=double_parameter, rebased=True),
    of("assigned-to-itself", compute, change=assign_itself, shows_in=()),
    of("tied-later", compute, change=tie),
    of("kept-in-an-attribute", keep_weight),
    of("kept-in-an-attribute-under-no-grad", keep_weight, around=torch.no_grad),
    of("kept-in-a-list", keep_weight_in_a_list, is_folded=False),
    of("gradient-inside", gradient_of_a_weight, is_limit=True),
    of("gradient-inside-of-a-sum", gradient_of_a_weight, options={"fused": False}),
    of("hooked", hook_on_a_weight, is_folded=False),
    of("hooked-in-part", hook_on_a_part_of_a_weight),
    of("same-object", same_object),
    of("tied-objects", tied_object),
    of("key-of-a-dictionary", key_of_a_dictionary),
    of("copy-of-a-layer", copy_of_a_layer),
    of("another-of-the-class", another_of_the_class),
    of("fused-copy", fused_copy, runs=(TRAIN,), is_limit=True),
    of("fused-copy-seen", fused_copy, runs=(EVAL, LARGE)),  # the example shows that the weight gets no gradient
    of("sparse", lambda net, x: torch.sparse.mm(x.detach().to_sparse(), net.first.weight) + net.second(x)),
    of("sparse-operator", lambda net, x: x.detach().to_sparse() @ net.first.weight + net.second(x)),
    of("sparse-rows", lambda net, x: net.first(x.detach().to_sparse_csr())),
    of("nested", nested(torch.strided)),
    of("jagged", nested(torch.jagged)),
    of("complex", lambda net, x: (x.cfloat() @ net.first.weight.cfloat()).real + net.second(x)),
    of("device-mode", compute, later_around=lambda: torch.device("cpu"), shows_in=()),
    of("flops-counted", compute, later_around=lambda: FlopCounterMode(display=False), shows_in=()),
    *(of(f"{name}-later", compute, change=seeded(change), shows_in=(), has_gradients=False)
      for name, change in LATER.items()),
    *(
        Situation(
            name=f"autocast-{name}", build=raw(use), later_around=lambda: torch.autocast("cpu", torch.bfloat16),
            shows_in=(), tolerance=(4e-2, 4e-2), runs=(EVAL, WATCHED, LARGE),
        )
        for name, use in AUTOCAST.items()
    ),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("situation", "run"), params(TABLE))
def test_weight_objects(situation: Situation, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    check(situation, run, monkeypatch)


def test_a_weight_that_was_kept_follows_the_adapters() -> None:
    """As a Parameter that was kept follows the optimizer."""
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    weight: Any = adapted.module.get_submodule("first").weight
    uses: list[Callable[[], Any]] = [lambda: x @ weight.T, lambda: weight.norm(), lambda: weight[0] * 1]
    for step in range(3):
        expected: Any = Oracle(adapted, model).model.get_parameter("first.weight").detach()
        assert_close([use().detach() for use in uses], [x @ expected.T, expected.norm(), expected[0]])
        with torch.no_grad():
            assert_close([use() for use in uses], [x @ expected.T, expected.norm(), expected[0]])
            for parameter in adapted.adapters.parameters():
                parameter.mul_(0.5 + step)


def test_an_adapted_weight_cannot_be_renamed() -> None:
    """torch's older ``spectral_norm`` registers W itself under another name, where nobody would see ΔW."""
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    before = adapted(x)
    with pytest.raises(SiteError, match=r"weight of Linear has an adapter and cannot become weight_orig"):
        torch.nn.utils.spectral_norm(adapted.module.get_submodule("first"))
    assert torch.equal(adapted(x), before)


@pytest.mark.parametrize("frozen", ["Q", "P", "lam", ""])
def test_frozen_parts_of_adapters(frozen: str) -> None:
    seed(1)
    model, x = make(compute)(), torch.randn(3, WIDTH)
    adapted = adapt(model, (x,))
    for name, parameter in adapted.adapters.named_parameters():
        parameter.requires_grad_(bool(frozen) and not name.endswith(frozen))
    oracle = Oracle(adapted, model)
    found, expected = adapted(x), oracle.model(x)
    assert_close(found, expected)
    assert found.requires_grad == bool(frozen)
    if frozen:
        found.sin().sum().backward()
        expected.sin().sum().backward()
        gradients = [p.grad for p in adapted.adapters.parameters() if p.requires_grad]
        assert_close(gradients, oracle.expected_gradients())


@pytest.mark.parametrize("options", [{}, {"checkpoint": True}, {"kind": "lora"}], ids=["svd", "checkpoint", "lora"])
def test_training_with_other_trained_parameters(options: dict[str, Any]) -> None:
    """Five steps of Adam give what they give with W + ΔW written out by hand."""
    seed(1)
    model, x = make(compute)().double(), torch.randn(6, WIDTH, dtype=torch.float64)
    adapted = adapt(model, (x,), trainable=("second.*", "*.bias"), exclude="inner.*", **options)
    by_hand = copy.deepcopy(model).requires_grad_(False)
    trained = {n: p.detach().clone().requires_grad_() for n, p in adapted.module.named_parameters() if p.requires_grad}
    adapters = {n: p.detach().clone().requires_grad_() for n, p in adapted.adapters.named_parameters()}
    assert set(trained) >= {"second.weight", "first.bias"}

    def run_by_hand() -> Tensor:
        (planned,) = adapted.plan.by_weight["first.weight"]
        own = {name: adapters[f"first.weight.{name}"] for name in planned.parameter_shapes}
        weights = {**trained, "first.weight": by_hand.get_parameter("first.weight") + planned.delta(own)}
        found: Tensor = torch.func.functional_call(by_hand, weights, (x,))
        return found

    first = torch.optim.Adam(adapted.trainable_parameters(), lr=0.05)
    second = torch.optim.Adam([*adapters.values(), *trained.values()], lr=0.05)
    for _ in range(5):
        for optimizer, call in ((first, lambda: adapted(x)), (second, run_by_hand)):
            optimizer.zero_grad()
            call().square().mean().backward()
            optimizer.step()
    assert_close(adapted(x).detach(), run_by_hand().detach(), (1e-9, 1e-9))
    assert_close(
        {n: p.detach() for n, p in adapted.adapters.named_parameters()}, {n: p.detach() for n, p in adapters.items()}
    )
