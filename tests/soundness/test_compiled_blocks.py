"""``AdaptedModel.compile``: equal blocks are compiled once, and calls give what eager calls give."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adapter_compiler as ac
from tests.soundness.common import WIDTH, randomize, seed
from tests.soundness.oracle import assert_close

BLOCKS = 4

pytestmark = [
    pytest.mark.usefixtures("fresh_compiler"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
]


class Block(nn.Module):
    """Layers of every kind whose adapters run on activations in compiled code."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        self.norm, self.drop = nn.LayerNorm(WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.down(torch.tanh(self.up(self.norm(x)))))
        convolved: Tensor = self.conv(x.mT)
        return x + convolved.mT


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(BLOCKS)])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.table(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x)
        return logits


def draw(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(0, 20, (batch, length))


def make_pair(**options: Any) -> tuple[ac.AdaptedModel, ac.AdaptedModel]:
    """Two equal adapted models: one to compile, one that stays eager."""
    seed(1)
    net = Net()
    config = ac.AdapterConfig(rank=3, alpha=3.0, sites=("*",), **options)
    pair = []
    for _ in range(2):
        seed(2)
        adapted = ac.compile_with_adapters(net, (draw(),), config=config)
        randomize(adapted, 0.1)
        pair.append(adapted.train())
    return pair[0], pair[1]


def run(call: Callable[..., Any], adapted: ac.AdaptedModel, tokens: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """The output and the gradients of the adapters."""
    adapted.zero_grad()
    output = call(tokens)
    output.float().square().mean().backward()
    return output.detach(), [p.grad for p in adapted.trainable_parameters()]


def assert_equal(pair: tuple[ac.AdaptedModel, ac.AdaptedModel], tokens: Tensor, tolerance: float = 1e-4) -> None:
    compiled, eager = (run(adapted, adapted, tokens) for adapted in pair)
    assert_close(compiled, eager, (tolerance, tolerance))


def count_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def count_breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


def test_equal_blocks_are_compiled_once() -> None:
    pair = make_pair()
    pair[0].compile(backend="aot_eager", fullgraph=True)
    assert_equal(pair, draw())
    assert count_graphs() == 1
    assert_equal(pair, draw())
    assert count_graphs() == 1


def test_few_compilations_for_many_lengths() -> None:
    pair = make_pair()
    pair[0].compile(backend="eager", fullgraph=True)
    for length in range(3, 23):
        assert_equal(pair, draw(2 + length % 3, length))
    assert count_graphs() <= 3


def find_made_shapes(call: Callable[..., Any], *args: Any) -> set[tuple[int, ...]]:
    """The shapes of all intermediate tensors of a call that is compiled as one graph."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch.compile(call, backend=keep, fullgraph=True)(*args)
    assert len(graphs) == 1
    nodes = [node.meta.get("example_value") for node in graphs[0].graph.nodes if node.op == "call_function"]
    return {tuple(value.shape) for value in nodes if isinstance(value, Tensor)}


def test_known_layers_make_no_matrix_of_the_size_of_their_weight() -> None:
    adapted, _ = make_pair()
    made = find_made_shapes(adapted, draw())
    weights = {tuple(adapted.base_weight(site.weight).shape) for site in adapted.sites}
    assert made
    assert not made & weights
    assert len(weights) == 5  # embedding, two linear layers of a block, convolution, head


def test_linear_layers_that_store_in_out_make_no_matrix_either() -> None:
    pytorch_utils = pytest.importorskip("transformers.pytorch_utils")
    net = nn.Sequential(pytorch_utils.Conv1D(10, WIDTH), nn.Tanh(), pytorch_utils.Conv1D(9, 10))
    x = torch.randn(3, 4, WIDTH)
    adapted = ac.compile_with_adapters(net, (x,))
    randomize(adapted, 0.3)
    assert not find_made_shapes(adapted, x) & {(WIDTH, 10), (10, WIDTH), (10, 9), (9, 10)}
    assert_close(torch.compile(adapted, backend="aot_eager", fullgraph=True)(x).detach(), adapted.fold()(x).detach())


def test_a_patched_convolution_runs_in_compiled_code(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted, _ = make_pair()
    monkeypatch.setattr(nn.Conv1d, "forward", lambda module, x: F.conv1d(x, module.weight * 2, None, padding=1))
    tokens = draw()
    assert_close(torch.compile(adapted, backend="eager")(tokens).detach(), adapted.fold().train()(tokens).detach())


def test_disabled_adapters() -> None:
    pair = make_pair()
    pair[0].compile(backend="eager")
    tokens = draw()
    assert_equal(pair, tokens)
    with pair[0].disable_adapters(), pair[1].disable_adapters():
        assert_close(pair[0](tokens).detach(), pair[1](tokens).detach())
    assert_equal(pair, tokens)


def test_another_adapter() -> None:
    pair = make_pair()
    pair[0].compile(backend="eager")
    tokens = draw()
    assert_equal(pair, tokens)
    for adapted in pair:
        seed(4)
        adapted.add_adapter("other", config=ac.AdapterConfig(rank=2, sites=("*up*", "*conv*")))
        adapted.use("other")
        randomize(adapted, 0.2)
    assert_equal(pair, tokens)
    for adapted in pair:
        adapted.use("default")
    assert_equal(pair, tokens)


@pytest.mark.parametrize("compact", [False, True])
def test_pruned(compact: bool) -> None:
    pair = make_pair()
    pair[0].compile(backend="eager")
    tokens = draw()
    schedule = ac.BudgetSchedule(
        target_rank=1, total_steps=4, warmup_steps=0, final_steps=2, interval=1, compact=compact
    )
    steps = []
    for adapted in pair:
        optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-3)
        steps.append((optimizer, ac.RankBudget(adapted, optimizer, schedule)))
    for _ in range(6):
        for adapted, (optimizer, _) in zip(pair, steps, strict=True):
            run(adapted, adapted, tokens)
            optimizer.step()
    assert steps[0][1].ranks() == steps[1][1].ranks()
    assert sum(steps[0][1].ranks().values()) < 3 * len(pair[0].sites)
    assert_equal(pair, tokens, 1e-3)


def test_autocast_with_a_gradient_scaler() -> None:
    pair = make_pair()
    pair[0].compile(backend="aot_eager")
    tokens = draw()
    assert_equal(pair, tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert_equal(pair, tokens, 3e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    values = []
    for adapted in pair:
        optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
        with torch.autocast("cpu", torch.bfloat16):
            loss = adapted(tokens).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        values.append([p.detach() for p in adapted.trainable_parameters()])
    assert_close(values[0], values[1], (3e-2, 3e-2))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_checkpointed(backend: str) -> None:
    pair = make_pair(checkpoint=True)
    pair[0].compile(backend=backend, fullgraph=True)
    assert_equal(pair, draw())
    assert count_graphs() == 1
    assert count_breaks() == 0


def test_in_data_parallel_training(tmp_path: Any) -> None:
    pair = make_pair()
    pair[0].compile(backend="aot_eager")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        wrapped = DistributedDataParallel(pair[0])
        for length in (7, 9):
            tokens = draw(2, length)
            assert_close(run(wrapped, pair[0], tokens), run(pair[1], pair[1], tokens))
    finally:
        dist.destroy_process_group()


def test_a_model_without_blocks_is_compiled_whole() -> None:
    seed(1)
    net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(54, 5))
    pair = []
    for _ in range(2):
        seed(2)
        adapted = ac.compile_with_adapters(net, (torch.randn(2, 3, 8, 8),), config=ac.AdapterConfig(sites=("*",)))
        randomize(adapted, 0.3)
        pair.append(adapted)
    pair[0].compile(backend="aot_eager", fullgraph=True)
    assert_equal((pair[0], pair[1]), torch.randn(2, 3, 8, 8))
    assert count_graphs() == 1


def test_blocks_of_torch_are_compiled_once() -> None:
    seed(1)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.TransformerEncoder(layer, BLOCKS, enable_nested_tensor=False))
    x = torch.randn(2, 5, WIDTH)
    pair = []
    for _ in range(2):
        seed(2)
        adapted = ac.compile_with_adapters(net, (x,)).train()
        randomize(adapted, 0.1)
        pair.append(adapted)
    pair[0].compile(backend="aot_eager", fullgraph=True)
    assert_equal((pair[0], pair[1]), x)
    assert count_graphs() == 1
    for adapted in pair:
        adapted.eval()
    with torch.no_grad():
        assert_close(pair[0](x), pair[1](x))


def test_copies_and_folded_models_are_eager() -> None:
    import copy

    pair = make_pair()
    pair[0].compile(backend="eager")
    tokens = draw()
    assert_equal(pair, tokens)
    known = count_graphs()
    copied = copy.deepcopy(pair[0])
    assert_close(copied(tokens).detach(), pair[1](tokens).detach())
    assert_close(pair[0].fold().train()(tokens).detach(), pair[1](tokens).detach())
    assert count_graphs() == known


def test_the_first_call_of_compiled_blocks_warns_of_nothing(caplog: pytest.LogCaptureFixture) -> None:
    adapted, _ = make_pair()
    adapted.compile(backend="eager")
    with caplog.at_level(logging.WARNING):
        adapted(draw())
        adapted(draw())
    assert caplog.text == ""
    assert count_graphs() == 1


def test_without_a_compiler_calls_are_eager(caplog: pytest.LogCaptureFixture) -> None:
    import torch._inductor.config as inductor

    pair = make_pair()
    with inductor.patch({"cpp.cxx": ("/nowhere/c++",)}), caplog.at_level(logging.WARNING):
        pair[0].compile()
        assert_equal(pair, draw())
    assert "nothing is compiled, and calls run in eager mode: torch.compile needs a C++ compiler" in caplog.text
    assert "CXX" in caplog.text
    assert count_graphs() == 0


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["blocks", "whole"])
def test_generated_code(mode: str) -> None:
    pair = make_pair()
    tokens = draw()
    if mode == "blocks":
        pair[0].compile()
        call: Any = pair[0]
    else:
        call = torch.compile(pair[0], fullgraph=True)
    for length in (7, 9, 11):
        tokens = draw(2, length)
        assert_close(run(call, pair[0], tokens), run(pair[1], pair[1], tokens))
