"""Every call runs the model's own Python, and always with its adapters."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import adapter_compiler as ac
from adapter_compiler.errors import CaptureError, SiteError

WIDTH = 4
X = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))


class Decides(nn.Module):
    """The values of the input decide which layer runs."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.left(x) if x.sum() > 0 else self.right(x)
        return y


@dataclasses.dataclass
class Batch:
    x: Tensor


class TakesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, batch: Batch) -> Tensor:
        y: Tensor = self.inner(batch.x)
        return y


class GivesBatch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Batch:
        return Batch(self.inner(x))


class Counts(nn.Module):
    """Changes a number attribute at each call."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.inner(x) * self.calls
        return y


class DrawsFromPython(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x) * random.random()
        return y


class ReachesIn(nn.Module):
    """Uses raw parameters, and the weight of a layer that it also calls, in Python that cannot be captured."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        scale = float(x.detach().abs().max().item())
        return F.linear(self.layer(x), self.layer.weight) @ self.raw.t() * scale


class Recomputes(nn.Module):
    """Python that cannot be captured, under activation checkpointing."""

    def __init__(self, use_reentrant: bool) -> None:
        super().__init__()
        self.layer, self.raw = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.randn(WIDTH, WIDTH))
        self.use_reentrant = use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x)) @ self.raw

        x = x * float(x.detach().abs().max().item())
        y: Tensor = checkpoint(run, x.requires_grad_(), use_reentrant=self.use_reentrant)
        return y


def adapt(model: nn.Module, *args: Any, **options: Any) -> ac.AdaptedModel:
    torch.manual_seed(0)
    adapted = ac.compile_with_adapters(model, args, config=ac.AdapterConfig(**{"rank": 2, "alpha": 2, **options}))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0.0, 0.5)
    return adapted


def effective_weights(adapted: ac.AdaptedModel, model: nn.Module) -> dict[str, Tensor]:
    weights = {}
    for adapter in adapted.plan:
        delta = adapter.delta(adapted.adapters.parameters_of(adapter))
        weights[adapter.site.name] = model.get_parameter(adapter.site.name).detach() + delta
    return weights


class Oracle(nn.Module):
    """A model's own code with replaced weights, and the gradients with respect to some tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, args: tuple[Any, ...], wanted: list[nn.Parameter]) -> tuple[Tensor, list[Tensor | None]]:
        return differentiate(self.model, args, wanted)


def differentiate(
    module: nn.Module, args: tuple[Any, ...], wanted: list[nn.Parameter]
) -> tuple[Tensor, list[Tensor | None]]:
    random.seed(3)
    torch.manual_seed(3)
    for parameter in wanted:
        parameter.grad = None
    y = module(*args)
    y = y.x if isinstance(y, Batch) else y
    y.square().sum().backward()
    return y.detach(), [parameter.grad for parameter in wanted]


def assert_right(adapted: ac.AdaptedModel, model: nn.Module, *args: Any) -> None:
    """Check that outputs and gradients are those of the model's own code with W + ΔW as plain weights."""
    oracle = Oracle(copy.deepcopy(model).requires_grad_(False))
    wanted = list(adapted.adapters.parameters())
    weights = {f"model.{name}": weight for name, weight in effective_weights(adapted, model).items()}
    expected, gradients = torch.func.functional_call(oracle, weights, (args, wanted))
    y, found = differentiate(adapted, args, wanted)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for mine, theirs in zip(found, gradients, strict=True):
        assert (mine is None or not mine.any()) if theirs is None else mine is not None
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


CASES: list[tuple[Callable[[], nn.Module], Any]] = [
    (TakesBatch, Batch(X)),
    (GivesBatch, X),
    (Counts, X),
    (DrawsFromPython, X),
    (ReachesIn, X),
    (lambda: Recomputes(False), X),
    (lambda: Recomputes(True), X),
]


@pytest.mark.parametrize(("make", "argument"), CASES)
@pytest.mark.parametrize("options", [None, {}, {"capture": "off"}], ids=["no example", "example", "watched"])
def test_any_python_runs_with_its_adapters(
    make: Callable[[], nn.Module], argument: Any, options: dict[str, Any] | None
) -> None:
    torch.manual_seed(1)
    model = make()
    adapted = adapt(model) if options is None else adapt(model, argument, **options)
    assert_right(adapted, model, argument)


def test_a_branch_that_the_example_did_not_take_is_adapted_without_an_example() -> None:
    model = Decides()
    adapted = adapt(model)
    for x in (X.abs(), -X.abs()):
        assert_right(adapted, model, x)
    assert {site.name for site in adapted.sites} == {"left.weight", "right.weight"}


class Keeps(nn.Module):
    """Draws random numbers and writes into a buffer before it branches on values, so many that dropout keeps some."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(WIDTH, 64), nn.Linear(64, 64)
        self.register_buffer("total", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("total").add_(1)
        x = F.dropout(self.left(x), 0.5)
        return x if x.detach().abs().sum() > 1e-9 else self.right(x) + F.dropout(torch.ones_like(x), 0.5)


def test_a_call_whose_values_choose_the_other_branch_takes_it() -> None:
    model = Keeps()
    adapted = adapt(model, X)
    with torch.no_grad():  # because zeros then stay zeros
        for each in (model, adapted.module):
            each.left.bias.zero_()  # type: ignore[union-attr,operator]
    assert_right(adapted, model, X)
    assert_right(adapted, model, torch.zeros_like(X))
    assert float(adapted.module.get_buffer("total")) == 2


class Notes(nn.Module):
    """Keeps values that it can always compute again: a width as a number, and a growing table."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.width = nn.Linear(WIDTH, WIDTH), 0
        self.tables: dict[int, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        self.width = x.shape[-1]
        if self.width not in self.tables:
            self.tables[self.width] = torch.arange(float(self.width))
        y: Tensor = self.inner(x) * self.width + self.tables[self.width]
        return y


class ScalesByItsFirstInput(nn.Module):
    """Like layers that initialize themselves from data: later calls depend on the first one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.detach().abs().max()
        y: Tensor = self.inner(x) / self.scale
        return y


class Shows(nn.Module):
    """Puts a tensor into an attribute that the user may read."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.shown: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        self.shown = y.detach()
        return y


def test_a_cache_that_changes_no_result_does_not_matter() -> None:
    model = Notes()
    adapted = adapt(model, X)
    assert_right(adapted, model, X)
    assert_right(adapted.eval(), model.eval(), X[:2])
    assert adapted.module.tables and not model.tables


@pytest.mark.parametrize("make", [ScalesByItsFirstInput, Shows])
def test_an_attribute_that_a_later_call_or_the_user_may_read_is_kept(make: Callable[[], nn.Module]) -> None:
    model = make()
    adapted = adapt(model, X)
    assert_right(adapted, model, X)
    model(X)
    assert_right(adapted, model, 3 * X)
    if isinstance(adapted.module, Shows):
        y = adapted(3 * X)
        assert adapted.module.shown is not None
        assert torch.equal(adapted.module.shown, y)


def test_a_branch_that_the_example_did_not_take_is_reported() -> None:
    adapted = adapt(Decides(), X.abs())
    assert [site.name for site in adapted.sites] == ["left.weight"]
    assert "does not use it" in adapted.rejected["right.weight"]


def test_compiling_leaves_no_state() -> None:
    model = Counts()
    adapted = adapt(model, X)
    assert model.calls == 0
    assert adapted.module.calls == 0
    adapted(X)
    adapted(X)
    assert model.calls == 0
    assert adapted.module.calls == 2


def test_folding_copying_and_pickling_give_the_users_classes() -> None:
    adapted = adapt(ReachesIn(), X)
    y = adapted(X)
    folded, copied = adapted.fold(), copy.deepcopy(adapted)
    assert type(folded) is ReachesIn
    assert type(folded.layer) is nn.Linear
    assert "forward" not in folded.layer.__dict__
    torch.testing.assert_close(folded(X), y)
    torch.testing.assert_close(copied(X), y)
    adapted(X)
    torch.testing.assert_close(pickle.loads(pickle.dumps(adapted))(X), y)


def test_the_base_is_the_users_model_also_after_its_python_ran() -> None:
    model = ReachesIn()
    adapted = adapt(model, X)
    adapted(X)
    base = adapted.copy_base()
    assert isinstance(base, ReachesIn)
    assert (type(base), type(base.layer)) == (ReachesIn, nn.Linear)
    assert "forward" not in base.layer.__dict__
    torch.testing.assert_close(base(X), model(X))
    assert base.raw.data_ptr() == model.raw.data_ptr()


def test_disabled_adapters_run_the_users_code() -> None:
    model = ReachesIn()
    adapted = adapt(model, X)
    y = adapted(X)
    with adapted.disable_adapters():
        torch.testing.assert_close(adapted(X), model(X))
    torch.testing.assert_close(adapted(X), y)


class Borrows(nn.Module):
    """Uses a layer that another part of the model registers, by calling it or by its weight."""

    def __init__(self, lender: nn.Linear, *, calls: bool) -> None:
        super().__init__()
        self.own, self.lender, self.calls = nn.Linear(WIDTH, WIDTH), [lender], calls

    def forward(self, x: Tensor) -> Tensor:
        (lender,) = self.lender
        y: Tensor = self.own(x)
        return lender(y) if self.calls else F.linear(y, lender.weight)


class Lends(nn.Module):
    def __init__(self, *, calls: bool) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.second = Borrows(self.first, calls=calls)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.first(x))
        return y


@pytest.mark.parametrize("calls", [True, False])
def test_a_layer_that_another_part_borrows_has_its_adapter_there_too(calls: bool) -> None:
    model = Lends(calls=calls)
    adapted = adapt(model, X)
    assert_right(adapted, model, X)
    assert_right(adapted.eval(), model.eval(), X[:, None])


@pytest.mark.parametrize("method", ["gradient_svd", "lora_ga", "eva"])
def test_weights_are_read_as_they_are_while_python_sees_effective_ones(method: str) -> None:
    model = ReachesIn()
    adapted = adapt(model, X, kind="lora" if method == "lora_ga" else "svd")
    adapted(X)
    start = ac.DataStart(method=method)
    ac.initialize_adapters(adapted, start, [X], lambda called, x: called(x).square().sum())
    torch.testing.assert_close(adapted(X), model(X), rtol=1e-4, atol=1e-4)
    adapted.add_adapter("other", config=ac.AdapterConfig(rank=2, kind="lora", init="pissa"))
    adapted.use("other")
    torch.testing.assert_close(adapted(X), model(X), rtol=1e-4, atol=1e-4)
    adapted(X).sum().backward()
    assert {n.rpartition(".")[2] for n, p in adapted.adapters.named_parameters() if p.grad is not None} == {"A", "B"}
    torch.testing.assert_close(adapted.fold()(X), adapted(X), rtol=1e-4, atol=1e-4)


def test_hooks_inside_keep_running() -> None:
    seen: list[str] = []
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
    model[2].register_forward_hook(lambda module, args, y: seen.append("inner"))
    model.register_forward_hook(lambda module, args, y: seen.append("outer"))
    adapted = adapt(model, X)
    seen.clear()
    assert_right(adapted, model, X)
    assert seen == ["inner", "outer"] * 2


class Block(nn.Module):
    def __init__(self, index: int) -> None:
        super().__init__()
        self.layer_idx = index
        self.up, self.down = nn.Linear(WIDTH, 6), nn.Linear(6, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.drop(self.down(torch.relu(self.up(x))))
        return y


class Stack(nn.Module):
    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(i) for i in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("whole", [True, False])
def test_regions_recompute_their_activations_with_checkpoint(whole: bool) -> None:
    model = Stack()
    adapted = adapt(model, X, regions=() if whole else Block, checkpoint=True)
    assert_right(adapted, model, X)


def test_a_region_that_matches_nothing_is_refused() -> None:
    with pytest.raises(SiteError, match=r"regions='blok\*' matches no submodule of Stack; .* Block"):
        ac.compile_with_adapters(Stack(), (X,), config=ac.AdapterConfig(regions=("blok*",)))


def test_an_example_that_the_model_refuses_is_named() -> None:
    with pytest.raises(CaptureError, match=r"refuses the call with args\[0\]: torch.float32 \(3, 5\): RuntimeErr"):
        ac.compile_with_adapters(Stack(), (torch.randn(3, WIDTH + 1),))


class StraightThrough(torch.autograd.Function):
    """Rounds forward and passes gradients on backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class Quantized(nn.Module):
    """torch.export gives the right forward and the wrong backward."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(StraightThrough.apply(self.first(x) * 8))  # type: ignore[no-untyped-call]
        return y


class Reenters(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.last, self.first(x), use_reentrant=True)
        return y


class Collector(nn.Module):
    """Appends its hidden states to a list from the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, states: list[Tensor]) -> Tensor:
        hidden = torch.tanh(self.first(x))
        states.append(hidden)
        result: Tensor = self.second(hidden)
        return result


def test_a_model_that_writes_into_its_arguments_still_does() -> None:
    model, x = Collector().eval(), torch.randn(2, 4)
    adapted = ac.compile_with_adapters(model, (x, []))
    states: list[Tensor] = []
    torch.testing.assert_close(adapted(x, states), model(x, []))
    assert len(states) == 1


class Sentences(nn.Module):
    """Reads hidden states that transformers collects by hooks which it registers at the first call."""

    def __init__(self) -> None:
        super().__init__()
        transformers = pytest.importorskip("transformers")
        config = transformers.BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16
        )
        self.encoder = transformers.BertModel(config, add_pooling_layer=False)

    def forward(self, ids: Tensor, output_hidden_states: bool = True) -> Tensor:
        found = self.encoder(ids, output_hidden_states=output_hidden_states)
        y: Tensor = found.hidden_states[-2] if output_hidden_states else found.last_hidden_state
        return y


def test_a_transformers_without_its_cache_support_does_not_stop_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setitem(sys.modules, "transformers.integrations.executorch", None)
    assert ac.compile_with_adapters(nn.Linear(4, 4), (torch.randn(2, 4),)).sites


def test_an_exception_that_the_model_catches_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Recovers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wide, self.narrow = nn.Linear(32, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            try:
                y: Tensor = self.wide(x)
            except RuntimeError:
                y = self.narrow(x)
            return y

    with caplog.at_level("WARNING"):
        adapted = ac.compile_with_adapters(Recovers(), (X,))
    assert [adapter.site.name for adapter in adapted.plan] == ["narrow.weight"]
    assert not caplog.records


@pytest.mark.parametrize("model", [Quantized(), Reenters()], ids=["autograd function", "reentrant checkpoint"])
def test_a_backward_of_the_models_own_is_kept(model: nn.Module) -> None:
    assert_right(adapt(model, X), model, X)


def test_a_cache_goes_in_and_comes_out() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=20
    )
    model, tokens = transformers.LlamaForCausalLM(config).eval(), torch.randint(0, 20, (2, 6))
    adapted = ac.compile_with_adapters(model, (tokens,))
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.3)
        folded = adapted.fold()
        first, expected = adapted(tokens), folded(tokens)
        assert type(first.cache) is type(expected.cache)
        following = torch.randint(0, 20, (2, 1))
        second = adapted(following, cache=first.cache)
        want = folded(following, cache=expected.cache)
        torch.testing.assert_close(second.logits, want.logits)
        assert first.cache.get_seq_length() == 7


def test_outputs_that_transformers_collects_by_hooks_are_collected() -> None:
    model, ids = Sentences().eval(), torch.randint(0, 20, (2, 6))
    adapted = adapt(model, ids).eval()
    assert_right(adapted, model, ids)
    assert_right(adapted, model, ids, False)
    assert_right(adapted, model, ids, True)


def test_weights_go_by_their_own_names_and_read_as_sums() -> None:
    model = ReachesIn()
    adapted = adapt(model, X)
    assert [name for name, _ in adapted.module.named_parameters()] == [name for name, _ in model.named_parameters()]
    assert list(adapted.module.state_dict()) == list(model.state_dict())
    weight: Any = adapted.module.get_submodule("layer").weight
    assert isinstance(weight, nn.Parameter) and weight.shape == (WIDTH, WIDTH) and weight.requires_grad
    torch.testing.assert_close(weight + 0, effective_weights(adapted, model)["layer.weight"])
    assert torch.equal(adapted.base_weight("layer.weight"), model.layer.weight)


def test_a_replaced_module_has_no_adapter_and_gives_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    adapted = adapt(Stack(2), X)
    adapted(X)
    fresh = nn.Linear(WIDTH, 6)
    adapted.module.get_submodule("blocks.1").up = fresh
    with caplog.at_level("WARNING"):
        y = adapted.eval()(X)
        adapted(X)
    (record,) = caplog.records
    assert "blocks.1.up.weight has no adapter any more" in record.getMessage()
    folded = adapted.fold()
    torch.testing.assert_close(folded(X), y)
    assert torch.equal(folded.get_parameter("blocks.1.up.weight"), fresh.weight)
