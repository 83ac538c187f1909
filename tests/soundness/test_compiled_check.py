"""Compiled graphs are compared with eager mode before they are used, and wrong ones are not used."""

from __future__ import annotations

import copy
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from passes.capture.compiled_check import CheckedBackend, draws_random_numbers
from tests.soundness.common import WIDTH, randomize, seed
from tests.soundness.oracle import assert_close

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]

Backend = Callable[..., Callable[..., Sequence[Any]]]


class Block(nn.Module):
    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.up, self.down, self.drop = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH), nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop(self.down(torch.tanh(self.up(x))))
        return y


def make_pair(drop: float = 0.0, **options: Any) -> tuple[ac.AdaptedModel, ac.AdaptedModel, Tensor]:
    seed(1)
    net, x = nn.Sequential(*[Block(drop) for _ in range(3)]), torch.randn(4, WIDTH)
    pair = []
    for _ in range(2):
        seed(2)
        adapted = ac.compile_with_adapters(net, (x,), config=ac.AdapterConfig(rank=2, **options))
        randomize(adapted, 0.2)
        pair.append(adapted.train())
    return pair[0], pair[1], x


def run(adapted: ac.AdaptedModel, x: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    adapted.zero_grad()
    output = adapted(x)
    output.square().mean().backward()
    return output.detach(), [p.grad for p in adapted.trainable_parameters()]


class _Scaled(torch.autograd.Function):
    """x with a gradient that is 1 % too large."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 1.01


def wrong_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return lambda *args: tuple(output * 1.01 for output in graph.forward(*args))


def wrong_backward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return lambda *args: tuple(_Scaled.apply(output) for output in graph.forward(*args))  # type: ignore[no-untyped-call]


def nan_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return lambda *args: tuple(output + float("nan") for output in graph.forward(*args))


def half_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    return lambda *args: tuple(output.half() for output in graph.forward(*args))


def writes_input(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    def call(*args: Any) -> Any:
        outputs = graph.forward(*args)
        next(arg for arg in args if isinstance(arg, Tensor) and not arg.requires_grad).add_(1)
        return outputs

    return call


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        (wrong_forward, "output 0 differs by"),
        (wrong_backward, "gradient of input [0-9]+ differs by"),
        (nan_forward, "output 0 differs by nan"),
        (half_forward, r"output 0 is torch.float16 \(4, [0-9]+\), expected torch.float32"),
        (writes_input, "input [0-9]+ after the call differs by"),
    ],
)
def test_a_wrong_graph_is_not_used(backend: Backend, message: str, caplog: pytest.LogCaptureFixture) -> None:
    compiled, eager, x = make_pair()
    before = x.clone()
    compiled.compile(backend=backend)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert_close(run(compiled, x), run(eager, x))
    assert torch.equal(x, before)
    assert caplog.records
    for record in caplog.records:
        assert "a graph that torch.compile has compiled differs from eager mode" in record.message
        assert re.search(message, record.message), record.message


def test_every_new_graph_is_checked_once(caplog: pytest.LogCaptureFixture) -> None:
    """A graph for another size is another one, and the first one is not compared again."""
    calls = 0

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def call(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return graph.forward(*args)

        return call

    compiled, eager, x = make_pair()
    x.requires_grad_()  # as the inputs of the second and third block do
    compiled.compile(backend=counting, dynamic=False)
    with caplog.at_level(logging.WARNING):
        for rows, expected in ((4, 4), (4, 7), (3, 11), (3, 14), (4, 17)):
            assert_close(run(compiled, x[:rows]), run(eager, x[:rows]))
            assert calls == expected
    assert caplog.text == ""


def test_a_graph_with_dropout_is_compared_only_if_draws_are_the_same(caplog: pytest.LogCaptureFixture) -> None:
    def wrong(graph: torch.fx.GraphModule, inputs: Any, options: Any = None) -> Any:
        return wrong_forward(graph, inputs)

    for drop, options, is_found in ((0.5, None, False), (0.0, None, True), (0.5, {"fallback_random": True}, True)):
        torch._dynamo.reset()
        caplog.clear()
        compiled, _, x = make_pair(drop)
        compiled.compile(backend=wrong, options=options)
        with caplog.at_level(logging.WARNING):
            compiled(x)
        assert ("differs from eager mode" in caplog.text) == is_found, (drop, options)


def test_the_check_draws_no_random_number() -> None:
    compiled, eager, x = make_pair()
    states = []
    for adapted in (compiled, eager):
        if adapted is compiled:
            adapted.compile(backend="aot_eager")
        seed(7)
        adapted(x)
        states.append(torch.random.get_rng_state())
    assert torch.equal(states[0], states[1])


def test_hooks_and_counters_run_once() -> None:
    compiled, _, x = make_pair()
    seen: list[int] = []
    compiled.module.get_submodule("1").register_forward_hook(lambda *_: seen.append(1))
    compiled.compile(backend="aot_eager")
    compiled(x)
    assert seen == [1]


def test_no_gradients_are_added() -> None:
    compiled, eager, x = make_pair()
    compiled.compile(backend="aot_eager")
    compiled(x)
    assert all(p.grad is None for p in compiled.trainable_parameters())
    for adapted in (compiled, eager):
        with torch.no_grad():
            adapted(x)
        with torch.inference_mode():
            adapted(x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_inside_a_checkpoint_of_the_user(backend: str, caplog: pytest.LogCaptureFixture) -> None:
    """The check saves tensors, which must not count as the checkpoint's."""
    compiled, eager, x = make_pair()
    compiled.compile(backend=backend)
    results = []
    with caplog.at_level(logging.WARNING):
        for adapted in (compiled, eager):
            adapted.zero_grad()
            output = torch.utils.checkpoint.checkpoint(adapted, x, use_reentrant=False)
            output.square().mean().backward()
            results.append([p.grad for p in adapted.trainable_parameters()])
    assert_close(results[0], results[1])
    assert caplog.text == ""


def narrow_forward(graph: torch.fx.GraphModule, inputs: Any) -> Any:
    """Rounds in other places than eager mode: computes in float32."""

    def call(*args: Any) -> Any:
        wide = [arg.float() if isinstance(arg, Tensor) and arg.dtype == torch.bfloat16 else arg for arg in args]
        return tuple(output.to(torch.bfloat16) for output in graph.forward(*wide))

    return call


def test_other_rounding_in_half_precision_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    seed(1)
    net, x = nn.Sequential(*[Block() for _ in range(3)]).to(torch.bfloat16), torch.randn(4096, WIDTH)
    adapted = ac.compile_with_adapters(net, (x.to(torch.bfloat16),), config=ac.AdapterConfig(rank=2))
    randomize(adapted, 0.2)
    adapted.train().compile(backend=narrow_forward)
    with caplog.at_level(logging.WARNING):
        adapted(x.to(torch.bfloat16)).float().square().mean().backward()
    assert caplog.text == ""


def test_equal_backends_are_one() -> None:
    """Dynamo shares code between blocks whose backends are equal."""
    assert CheckedBackend() == CheckedBackend(backend="inductor")
    assert CheckedBackend() != CheckedBackend(backend="aot_eager")
    assert copy.deepcopy(CheckedBackend()) == CheckedBackend()


def find_graph(function: Callable[..., Any], *args: Any) -> torch.fx.GraphModule:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(function, backend=keep, fullgraph=True)(*args)
    return graphs[0]


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda x: nn.functional.dropout(x, 0.5), True),
        (lambda x: nn.functional.dropout(x, 0.5, training=False), False),
        (lambda x: nn.functional.dropout(x, 0.0), False),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.1), True),
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), False),
        (lambda x: x + torch.rand_like(x), True),
        (lambda x: torch.bernoulli(x.sigmoid()), True),
        (lambda x: x.normalize() if hasattr(x, "normalize") else nn.functional.normalize(x), False),
    ],
)
def test_graphs_that_draw_random_numbers(function: Callable[..., Any], expected: bool) -> None:
    assert draws_random_numbers(find_graph(function, torch.randn(1, 1, 4, 4))) is expected


WITHOUT_COMPILER = """
import logging, torch
from torch import nn
import adapter_compiler as ac

logging.basicConfig(level=logging.WARNING, format="%(message)s")
block = lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4))
x = torch.randn(3, 4)
adapted = ac.compile_with_adapters(nn.Sequential(block(), block()), (x,))
expected = adapted(x)
adapted.compile()
assert torch.equal(adapted(x), expected)
adapted(x).sum().backward()
print("eager goes on")
"""


def test_a_machine_without_a_compiler() -> None:
    """No program is found on the path, and none is named."""
    environment = {k: v for k, v in os.environ.items() if k not in ("CXX", "CC")} | {"PATH": "/nowhere"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run([sys.executable, "-c", WITHOUT_COMPILER], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "eager goes on" in done.stdout
    assert "nothing is compiled, and calls run in eager mode: torch.compile needs a C++ compiler" in done.stderr
