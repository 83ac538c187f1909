"""torch.compile around an adapted model, what changes between its calls, and other ways to trace one."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from tests.soundness.common import WIDTH, adapt, make, put, randomize, seed
from tests.soundness.oracle import Oracle, assert_close

FLAGS = {"scale": 1.0}

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


def compute(net: Any, x: Tensor) -> Any:
    y = net.norm(net.inner(x)) * net.scale * FLAGS["scale"]
    return F.linear(y, net.raw) + (net.first(y) if net.flag else y)


def decide(net: Any, x: Tensor) -> Any:
    """Has a graph break."""
    y = net.first(x)
    return net.second(y) if y.sum().item() > 0 else net.inner(y)


def use_embedding(net: Any, x: Tensor) -> Any:
    return net.second(F.embedding(x.abs().long().sum(1) % WIDTH, net.raw))


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.TransformerEncoderLayer(WIDTH, 2, 12, batch_first=True) for _ in range(2)])
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor) -> Any:
        x = x[None]
        for block in self.blocks:
            x = block(x)
        return self.conv(x.mT).mT


class Case:
    """An adapted model, its oracle and the model without adapters."""

    def __init__(self, build: Callable[[], nn.Module], *, training: bool = False, **options: Any) -> None:
        seed(1)
        self.base = build().train(training)
        self.x = torch.randn(3, WIDTH)
        self.adapted = adapt(self.base, (self.x,), **options)
        self.renew()

    def renew(self) -> None:
        """Make the oracle of the present adapters."""
        self.oracle = Oracle(self.adapted, self.base)

    def assert_right(self, call: Callable[..., Any], x: Tensor | None = None) -> None:
        """Output and gradients."""
        x = self.x if x is None else x
        self.adapted.zero_grad()
        self.oracle.zero_grad()
        seed(2)
        found = call(x)
        seed(2)
        expected = self.oracle.model(x)
        assert_close(found, expected)
        if found.requires_grad:
            found.sin().sum().backward()
            expected.sin().sum().backward()
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.adapted.adapters.parameters()]
            assert_close(gradients, self.oracle.expected_gradients(), (1e-4, 1e-4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": make(compute),
    "breaks": make(decide),
    "embedding": make(use_embedding),
    "several": Several,
}


def compiled(target: Any, **options: Any) -> Any:
    return torch.compile(target, backend="eager", **options)


QUICK = [("plain", False, "eager"), ("embedding", True, "eager")]
ALL = [(name, training, backend) for name in MODELS for training in (False, True) for backend in ("eager", "aot_eager")]


@pytest.mark.parametrize(
    ("name", "training", "backend"),
    [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow) for case in ALL],
)
def test_compiled(name: str, training: bool, backend: str) -> None:
    case = Case(MODELS[name])
    for one in (case.adapted, case.oracle.model):
        one.train(training and name != "several")  # dropout draws other numbers when compiled
    call = torch.compile(case.adapted, backend=backend)
    case.assert_right(call)
    case.assert_right(call, torch.randn(5, WIDTH) * 2)
    case.assert_right(case.adapted)
    with torch.no_grad():
        case.assert_right(call)


@pytest.mark.parametrize(
    "kind", ["dora", pytest.param("lora", marks=pytest.mark.slow), pytest.param("dora-svd", marks=pytest.mark.slow)]
)
def test_compiled_in_other_forms(kind: str) -> None:
    case = Case(make(compute), kind=kind)
    case.assert_right(compiled(case.adapted))


CHANGES: dict[str, Callable[[Any], object]] = {
    "number": put("scale", 3.0),
    "flag": put("flag", False),
    "eps": put("norm.eps", 3.0),
    "bias": put("first.bias", None),
    "submodule": put("inner", nn.Tanh),
    "hook": lambda net: net.first.register_forward_hook(lambda m, a, y: y * 2),
    "forward": lambda net: setattr(net.first, "forward", lambda x: x * 2),
    "weight-in-place": lambda net: net.first.weight.data.mul_(2),
    "class": lambda net: setattr(net.inner[1], "__class__", nn.Sigmoid),
}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[] if n == "number" else pytest.mark.slow) for n in CHANGES])
def test_a_change_is_seen(name: str) -> None:
    case = Case(make(compute))
    call = compiled(case.adapted)
    case.assert_right(call)
    before = case.oracle.model(case.x)
    for model in (case.adapted.module, case.oracle.model):
        CHANGES[name](model)
    if name in ("hook", "forward"):
        torch._dynamo.reset()  # Dynamo itself does not guard these
    case.assert_right(call)
    assert not torch.allclose(before, case.oracle.model(case.x))


def test_adapters_that_change_are_seen() -> None:
    case = Case(make(compute))
    call = compiled(case.adapted)
    case.assert_right(call)
    randomize(case.adapted, 0.9)
    case.renew()
    case.assert_right(call)
    case.adapted.add_adapter("other")
    case.adapted.use("other")
    randomize(case.adapted, 0.4)
    case.renew()
    case.assert_right(call)
    case.adapted.use("default")
    case.renew()
    case.assert_right(call)


def test_a_global_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(make(compute))
    call = compiled(case.adapted)
    case.assert_right(call)
    monkeypatch.setitem(FLAGS, "scale", 3.0)
    case.assert_right(call)


@pytest.mark.parametrize("is_first_disabled", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "target",
    ["adapted", pytest.param("module", marks=pytest.mark.slow), pytest.param("method", marks=pytest.mark.slow)],
)
def test_adapters_are_disabled_around_the_compiled_call(target: str, is_first_disabled: bool) -> None:
    case = Case(make(compute))
    call = compiled(
        {"adapted": case.adapted, "module": case.adapted.module, "method": case.adapted.module.forward}[target]
    )
    for is_disabled in (is_first_disabled, not is_first_disabled) * 2:
        if is_disabled:
            with case.adapted.disable_adapters():
                assert_close(call(case.x), case.base(case.x).detach())
        else:
            case.assert_right(call)


@pytest.mark.slow
def test_adapters_are_disabled_inside() -> None:
    case = Case(make(compute))

    @torch.compile(backend="eager")
    def both(x: Tensor) -> Any:
        with case.adapted.disable_adapters():
            reference = case.adapted(x)
        return case.adapted(x), reference

    found, reference = both(case.x)
    assert_close(found, case.oracle.model(case.x))
    assert_close(reference.detach(), case.base(case.x).detach())


@pytest.mark.slow
def test_compiled_in_place_and_copied_regions() -> None:
    case = Case(Several, training=False)
    module: Any = case.adapted.module
    for block in module.blocks:
        block.compile(backend="eager")
    case.assert_right(case.adapted)
    case.adapted.compile(backend="eager")
    case.assert_right(case.adapted)
    assert_close(case.adapted.fold()(case.x).detach(), case.oracle.model(case.x).detach())


def test_a_compiled_model_is_adapted() -> None:
    seed(1)
    base: Any = make(compute)().eval()
    x = torch.randn(3, WIDTH)
    base.inner = torch.compile(base.inner, backend="eager")
    adapted = adapt(base, (x,))
    assert_close(adapted(x).detach(), adapted.fold()(x).detach())
    assert not torch.allclose(adapted(x), base(x))


def test_exported() -> None:
    case = Case(make(compute))
    exported = torch.export.export(case.adapted, (case.x,), strict=False)
    assert_close(exported.module()(case.x).detach(), case.oracle.model(case.x).detach())


def test_traced_by_torchscript() -> None:
    case = Case(make(compute))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(case.adapted, (case.x,), check_trace=False)
    assert_close(traced(case.x).detach(), case.oracle.model(case.x).detach())


def test_recorded_by_make_fx() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    case = Case(make(compute))
    graph = make_fx(case.adapted)(case.x)
    assert_close(graph(case.x).detach(), case.oracle.model(case.x).detach())


@pytest.mark.slow
def test_captured() -> None:
    case = Case(make(compute))
    graph = case.adapted.capture(case.x)
    assert_close(graph(case.x)[0].detach(), case.oracle.model(case.x).detach())
    assert isinstance(case.adapted, ac.AdaptedModel)
