"""AdaptedModel: folding, gradients, copies, and switching adapters off."""

from __future__ import annotations

import copy
import io
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import adapter_compiler as ac
from passes.forms import SvdForm


class Block(nn.Module):
    """A tied weight, a module called twice, a transposed raw weight, an embedding, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.twice = nn.Linear(6, 6)
        self.raw = nn.Parameter(torch.randn(6, 6) / 2)
        self.norm = nn.BatchNorm1d(6)
        self.decoder = nn.Linear(6, 11, bias=False)
        self.decoder.weight = self.embed.weight
        self.label = "mine"

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens).mean(1)
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.norm(x @ self.raw + F.linear(x, self.raw))
        y: Tensor = self.decoder(x)
        return y


TOKENS = torch.arange(12).reshape(4, 3) % 11


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    return Block()


def adapt(model: nn.Module, *args: Tensor, sites: str | tuple[str, ...] = "all-linear") -> ac.AdaptedModel:
    """Adapters whose ΔW is as large as the weights."""
    adapted = ac.compile_with_adapters(model, args, config=ac.AdapterConfig(rank=3, alpha=3, sites=sites))
    randomize(adapted)
    return adapted


def randomize(adapted: ac.AdaptedModel) -> None:
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.5)


ALL = ("embed", "twice", "raw")


def test_folded_computes_the_same_as_the_adapted_model(block: Block) -> None:
    adapted = adapt(block.eval(), TOKENS, sites=ALL)
    assert [site.name for site in adapted.sites] == ["raw", "embed.weight", "twice.weight"]
    assert adapted.sites[1].aliases == ("decoder.weight",)
    expected = adapted(TOKENS)
    assert not torch.allclose(expected, block(TOKENS), atol=1e-2)
    merged = adapted.fold()
    torch.testing.assert_close(merged(TOKENS), expected, rtol=1e-4, atol=1e-5)
    assert adapted.fold_report is not None
    assert adapted.fold_report.rounding_error.keys() == {"raw", "embed.weight", "twice.weight"}
    assert 0 < adapted.fold_report.largest < 1e-6


def test_folding_before_training_gives_back_the_model_bit_for_bit(block: Block) -> None:
    block.raw.requires_grad_(False)
    adapted = ac.compile_with_adapters(block, (TOKENS,), config=ac.AdapterConfig(sites=ALL))
    merged = adapted.fold()
    torch.testing.assert_close(merged.state_dict(), block.state_dict(), rtol=0, atol=0)
    assert {n: p.requires_grad for n, p in merged.named_parameters()} == {
        n: p.requires_grad for n, p in block.named_parameters()
    }


def find_ours(value: object) -> list[str]:
    """Names of classes of this library anywhere among a module's submodules, attributes and hooks."""
    assert isinstance(value, nn.Module)
    found = []
    for module in value.modules():
        held = [module, *vars(module).values()]
        for registry in vars(module).values():
            if isinstance(registry, dict):
                held += list(registry.values())
        kinds = [item if isinstance(item, (type, types.FunctionType)) else type(item) for item in held]
        found += [k.__module__ for k in kinds if k.__module__.partition(".")[0] in ("adapter_compiler", "passes")]
    return found


def test_nothing_of_this_library_is_left_in_the_folded_module(block: Block) -> None:
    adapted = adapt(block, TOKENS, sites=ALL)
    adapted(TOKENS)
    assert find_ours(adapted)
    merged = adapted.fold()
    assert find_ours(merged) == []
    assert type(merged) is Block
    assert merged.label == "mine"
    assert list(merged.state_dict()) == list(block.state_dict())
    assert merged.decoder.weight is merged.embed.weight
    assert [name for name, _ in merged.named_modules()] == [name for name, _ in block.named_modules()]


def test_folded_shares_nothing_and_keeps_the_mode(block: Block) -> None:
    adapted = adapt(block, TOKENS)
    adapted.eval()
    merged = adapted.fold()
    assert not any(module.training for module in merged.modules())
    for name, value in merged.state_dict().items():
        assert value.data_ptr() != block.state_dict()[name].data_ptr()
        assert value.data_ptr() != adapted.module.state_dict()[name].data_ptr()


def test_folding_twice_gives_the_same_and_leaves_the_adapters(block: Block) -> None:
    adapted = adapt(block, TOKENS)
    before = copy.deepcopy(adapted.state_dict())
    torch.testing.assert_close(adapted.fold().state_dict(), adapted.fold().state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(adapted.state_dict(), before, rtol=0, atol=0)


def test_fold_keeps_running_statistics(block: Block) -> None:
    adapted = adapt(block, TOKENS)
    adapted.train()
    adapted(TOKENS)
    running = adapted.module.get_buffer("norm.running_mean")
    assert running.any()
    assert not block.norm.running_mean.any()  # type: ignore[union-attr]
    assert torch.equal(adapted.fold().get_buffer("norm.running_mean"), running)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_gradients_are_those_of_effective_weights_in_eager(block: Block, training: bool) -> None:
    model = block.double().train(training)
    adapted = adapt(model, TOKENS, sites=ALL)
    target = torch.randn(4, 11, dtype=torch.float64)
    F.mse_loss(adapted(TOKENS), target).backward()

    leaves: dict[str, Tensor] = {}
    effective: dict[str, Tensor] = {}
    for adapter in adapted.plan:
        own = {name: p.detach().clone().requires_grad_() for name, p in adapted.adapters.parameters_of(adapter).items()}
        leaves |= {f"{adapter.site.name}.{name}": value for name, value in own.items()}
        delta = SvdForm().delta(own, adapter.scale)
        weight = model.get_parameter(adapter.site.name).detach()
        effective[adapter.site.name] = weight + (delta.t() if adapter.site.transposed else delta)
    reference = torch.func.functional_call(copy.deepcopy(model), effective, (TOKENS,))
    F.mse_loss(reference, target).backward()

    gradients = dict(adapted.adapters.named_parameters())
    assert gradients.keys() == leaves.keys()
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 1e-9
        torch.testing.assert_close(gradients[name].grad, leaf.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: n + m)  # type: ignore[misc]


def test_chained_layers_without_anything_between_fold_right() -> None:
    """An adapter must read the adapted output of the previous layer, in any order of registration."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Linear(5, 3)
            self.second = nn.Parameter(torch.randn(5, 5))
            self.first = nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.third(self.first(x) @ self.second)
            return y

    torch.manual_seed(0)
    x = torch.randn(6, 4)
    adapted = adapt(Chain().eval(), x)
    torch.testing.assert_close(adapted.fold()(x), adapted(x), rtol=1e-4, atol=1e-4)


def test_disable_adapters_runs_the_users_module(block: Block) -> None:
    adapted = adapt(block.eval(), TOKENS)
    with adapted.disable_adapters():
        assert torch.equal(adapted(TOKENS), block(TOKENS))
        with adapted.disable_adapters():
            pass
        assert torch.equal(adapted(TOKENS), block(TOKENS))
    assert not torch.allclose(adapted(TOKENS), block(TOKENS), atol=1e-2)
    with pytest.raises(RuntimeError, match="mine"), adapted.disable_adapters():
        raise RuntimeError("mine")
    assert not torch.allclose(adapted(TOKENS), block(TOKENS), atol=1e-2)


def test_a_deep_copy_is_independent(block: Block) -> None:
    adapted = adapt(block.eval(), TOKENS)
    expected = adapted(TOKENS)
    other = copy.deepcopy(adapted)
    assert torch.equal(other(TOKENS), expected)
    randomize(other)
    assert not torch.allclose(other(TOKENS), expected, atol=1e-2)
    assert torch.equal(adapted(TOKENS), expected)
    torch.testing.assert_close(other.fold()(TOKENS), other(TOKENS), rtol=1e-4, atol=1e-5)


def test_state_dict_loads_through_torch_save(block: Block, tmp_path: Path) -> None:
    adapted = adapt(block.eval(), TOKENS)
    expected = adapted(TOKENS)
    torch.save(adapted.state_dict(), tmp_path / "state.pt")
    randomize(adapted)
    assert not torch.equal(adapted(TOKENS), expected)
    adapted.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert torch.equal(adapted(TOKENS), expected)


def test_the_whole_object_pickles(block: Block) -> None:
    adapted = adapt(block.eval(), TOKENS)
    expected = adapted(TOKENS)
    file = io.BytesIO()
    torch.save(adapted, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(TOKENS), expected)
    randomize(other)
    assert not torch.equal(other(TOKENS), expected)


@pytest.mark.parametrize("rows", [2, 512])  # one each for the two ways of computing few and many rows
def test_a_model_without_memory_trains(rows: int) -> None:
    with torch.device("meta"):
        model, x = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), torch.empty(rows, 6)
    adapted = ac.compile_with_adapters(model, config=ac.AdapterConfig(rank=2))
    outputs = adapted(x)
    assert outputs.is_meta and outputs.shape == (rows, 3)
    outputs.sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in adapted.trainable_parameters())


def test_another_dtype() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 6)
    adapted = adapt(nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3)), x)
    narrow = adapted(x)
    adapted.to(torch.float64)
    wide = adapted(x.double())
    assert wide.dtype == torch.float64
    torch.testing.assert_close(wide.float(), narrow, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adapted.fold()(x.double()), wide)


@pytest.mark.parametrize("training", [False, True])
def test_captured_graphs_compute_what_calls_do_with_adapters_and_folded(block: Block, training: bool) -> None:
    adapted = adapt(block.train(training), TOKENS, sites=("embed*", "twice*", "raw"))
    assert len(adapted.plan) == len(ALL)
    weights = {name: p.detach().clone() for name, p in adapted.module.named_parameters()}
    whole, folded = adapted.capture(TOKENS), adapted.capture_folded(TOKENS)
    other = TOKENS.flip(0)
    expected = adapted(other)
    torch.testing.assert_close(whole(other)[0], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(folded(other)[0], expected, rtol=1e-4, atol=1e-5)
    assert [n for n in whole.graph.nodes if "adapter_site" in n.meta]
    assert not [n for n in folded.graph.nodes if "adapter_site" in n.meta]
    assert all(torch.equal(p, weights[name]) for name, p in adapted.module.named_parameters())
    assert len(adapted.plan) == len(ALL)
