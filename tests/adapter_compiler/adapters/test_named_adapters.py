"""Several adapters on one model: each behaves as if it were the only one, and they share the frozen weights."""

from __future__ import annotations

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import BudgetError, CheckpointError, ConfigError, SiteError

X = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.raw = nn.Parameter(torch.randn(6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.norm(self.body(x)).relu() @ self.raw)
        return y


class Plain(nn.Module):
    """A model in which only adapters change in training."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 7)
        self.down = nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(self.up(x).tanh())
        return y


def compile_net(net: nn.Module, **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(**{"rank": 2, "alpha": 2, **options})
    return ac.compile_with_adapters(net, (X,), config=config)


def train(adapted: ac.AdaptedModel, *, steps: int = 3, lr: float = 0.02) -> None:
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=lr)
    for _ in range(steps):
        adapted(X).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def randomize(adapted: ac.AdaptedModel, *names: str) -> None:
    with torch.no_grad():
        for name in names or adapted.adapter_names:
            for parameter in adapted.parameters_of_adapter(name).parameters():
                parameter.normal_(0, 0.5)


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def plain() -> ac.AdaptedModel:
    torch.manual_seed(0)
    return compile_net(Plain())


def test_two_adapters_train_as_two_models_would(net: Net) -> None:
    """They train in turns on one model, and each has its own head and running statistics."""
    alone = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        alone.append(compile_net(copy.deepcopy(net), trainable="head"))
    torch.manual_seed(1)
    both = compile_net(net, trainable="head")
    torch.manual_seed(2)
    both.add_adapter("second")
    assert both.adapter_names == ("default", "second")
    for name, model in zip(both.adapter_names, alone, strict=True):
        both.use(name)
        train(both, steps=3)
        train(model, steps=3)
    for name, model in zip(both.adapter_names, alone, strict=True):
        both.use(name)
        assert both.active_adapter == name
        torch.testing.assert_close(both.eval()(X), model.eval()(X), rtol=0, atol=0)
        torch.testing.assert_close(both.fold().state_dict(), model.fold().state_dict(), rtol=0, atol=0)


def test_the_frozen_weights_exist_once(net: Net) -> None:
    adapted = compile_net(net)
    adapted.add_adapter("second")
    adapted.use("second")
    assert adapted.base_weight("raw").data_ptr() == net.raw.data_ptr()
    values = sum(p.numel() for p in adapted.parameters())
    of_adapters = sum(
        p.numel() for name in adapted.adapter_names for p in adapted.parameters_of_adapter(name).parameters()
    )
    assert values == sum(p.numel() for p in net.parameters()) + of_adapters


def test_only_the_active_adapter_trains(plain: ac.AdaptedModel) -> None:
    plain.add_adapter("second")
    randomize(plain)
    plain.use("second")
    before = {key: value.clone() for key, value in plain.parameters_of_adapter("default").state_dict().items()}
    assert {id(p) for p in plain.trainable_parameters()} == {
        id(p) for p in plain.parameters_of_adapter("second").parameters()
    }
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    plain(X).sum().backward()
    optimizer.step()
    torch.testing.assert_close(plain.parameters_of_adapter("default").state_dict(), before, rtol=0, atol=0)
    plain.use("default")
    assert all(p.requires_grad for p in plain.adapters.parameters())
    assert not any(p.requires_grad for p in plain.parameters_of_adapter("second").parameters())


def test_an_adapter_may_have_other_sites_ranks_and_scales(plain: ac.AdaptedModel) -> None:
    base = plain(X)
    plain.add_adapter("narrow", config=ac.AdapterConfig(sites="down", rank=1, alpha=3))
    randomize(plain)
    plain.use("narrow")
    assert [(a.site.name, a.rank, a.scale) for a in plain.plan] == [("down.weight", 1, 3.0)]
    (adapter,) = plain.plan
    parameters = plain.adapters.parameters_of(adapter)
    expected = (plain.module.up(X).tanh()) @ adapter.delta(parameters).t() + base  # type: ignore[operator]
    torch.testing.assert_close(plain(X), expected)
    plain.add_adapter("planned", plan=plain.adapter_set.plans["default"])
    assert plain.adapter_set.plans["planned"] == plain.adapter_set.plans["default"]


def test_the_state_dict_has_every_adapter_under_its_own_name(net: Net) -> None:
    """This also holds if it was written while another adapter was active."""
    adapted = compile_net(Plain())
    adapted.add_adapter("b")
    randomize(adapted)
    results = {}
    for name in adapted.adapter_names:
        adapted.use(name)
        results[name] = adapted(X)
    other = compile_net(copy.deepcopy(adapted.fold()))
    other.add_adapter("b")
    assert list(other.state_dict()) == list(adapted.state_dict())
    other.load_state_dict(adapted.state_dict())
    for name in other.adapter_names:
        other.use(name)
        torch.testing.assert_close(other(X), results[name], rtol=0, atol=0)
    # The state also has the tensors that inactive adapters keep, so a state of another active adapter is refused.
    first, second = (compile_net(copy.deepcopy(net), trainable="head") for _ in range(2))
    for model in (first, second):
        model.add_adapter("b")
    first.use("b")
    with pytest.raises(RuntimeError, match=r"adapter_set\.inactive\.default\.head\.weight"):
        second.load_state_dict(first.state_dict())


def test_each_is_saved_and_loaded(net: Net, tmp_path: Path) -> None:
    adapted = compile_net(net, trainable="head")
    adapted.add_adapter("b", config=ac.AdapterConfig(rank=3, sites="raw"))
    results = {}
    for name in adapted.adapter_names:
        adapted.use(name)
        train(adapted)
        results[name] = adapted.eval()(X)
    for name in adapted.adapter_names:
        adapted.save(tmp_path / name, name=name)
    fresh = compile_net(copy.deepcopy(net), rank=1, trainable="head")
    before = fresh.eval()(X)
    fresh.load_adapter("one", tmp_path / "default")
    fresh.load_adapter("two", tmp_path / "b")
    assert torch.equal(fresh(X), before)
    for name, saved in (("one", "default"), ("two", "b")):
        fresh.use(name)
        torch.testing.assert_close(fresh(X), results[saved], rtol=0, atol=0)
    fresh.use("default")
    assert torch.equal(fresh(X), before)


def test_loading_refuses_what_does_not_fit(net: Net, tmp_path: Path) -> None:
    adapted = compile_net(net, trainable="head")
    adapted.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight of this model that can carry an adapter"):
        compile_net(Plain()).load_adapter("a", tmp_path)
    with pytest.raises(CheckpointError, match=r"head\.\w+ of shape .* was trained fully, this model has nothing"):
        compile_net(copy.deepcopy(net)).load_adapter("a", tmp_path)
    with pytest.raises(CheckpointError, match="holds no adapters"):
        adapted.load_adapter("a", tmp_path / "none")
    assert adapted.adapter_names == ("default",)


def test_copies_and_moves_take_all_adapters_along(plain: ac.AdaptedModel) -> None:
    plain.add_adapter("b")
    randomize(plain)
    plain.use("b")
    expected = plain(X)
    buffer = io.BytesIO()
    torch.save(plain, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(plain), torch.load(buffer, weights_only=False), plain.double()):
        x = X.to(next(other.parameters()).dtype)
        assert other.active_adapter == "b"
        torch.testing.assert_close(other(x), expected.to(x.dtype), rtol=1e-5, atol=1e-6)
        other.use("default")
        assert not torch.allclose(other(x), expected.to(x.dtype))
        assert {a.dtype for a in other.plan} == {x.dtype}


def test_removing(plain: ac.AdaptedModel) -> None:
    plain.add_adapter("b")
    with pytest.raises(ConfigError, match="adapter 'default' is active"):
        plain.remove_adapter("default")
    plain.use("b")
    plain.remove_adapter("default")
    assert plain.adapter_names == ("b",)
    assert not any(key.startswith("adapters.") for key in plain.state_dict())
    plain(X).sum().backward()
    plain.add_adapter("c")
    plain.use("c")
    plain.remove_adapter("b")
    assert torch.equal(plain(X), plain.fold()(X))


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "default", 3])
def test_names_that_cannot_be(plain: ac.AdaptedModel, name: str) -> None:
    with pytest.raises(ConfigError, match=r"cannot name an adapter|there is an adapter 'default' already"):
        plain.add_adapter(name)


def test_the_error_for_an_unknown_name_lists_the_known_ones(plain: ac.AdaptedModel) -> None:
    plain.add_adapter("b")
    for act in (plain.use, plain.remove_adapter, plain.parameters_of_adapter):
        with pytest.raises(ConfigError, match="no adapter 'c', expected one of 'default', 'b'"):
            act("c")
    with pytest.raises(SiteError, match="would have no site"):
        plain.add_adapter("c", config=ac.AdapterConfig(exclude="*"))


def test_a_budget_prunes_the_adapter_that_it_was_made_for(plain: ac.AdaptedModel) -> None:
    schedule = ac.BudgetSchedule(target_rank=1, total_steps=4, warmup_steps=0, final_steps=1)
    optimizer = torch.optim.SGD(plain.trainable_parameters(), lr=0.1)
    budget = ac.RankBudget(plain, optimizer, schedule)
    plain.add_adapter("b")
    plain.use("b")
    plain(X).sum().backward()
    with pytest.raises(BudgetError, match=r"prunes the adapter 'default', but 'b' is active; .* use\('default'\)"):
        optimizer.step()
    with pytest.raises(BudgetError, match="prunes the adapter 'default'"):
        budget.compact()
    with pytest.raises(BudgetError, match=r"it holds the adapter 'default', but 'b' is active; make it from"):
        ac.RankBudget(plain, optimizer, schedule)
    other = torch.optim.SGD(plain.trainable_parameters(), lr=0.1)
    second = ac.RankBudget(plain, other, schedule)
    for _ in range(4):
        for name, one in (("b", other), ("default", optimizer)):
            plain.use(name)
            plain(X).sum().backward()
            one.step()
            one.zero_grad()
    assert (budget.live_triplets, second.live_triplets) == (2, 2)
    assert sum(budget.compact().values()) == 2
    assert [plain.adapter_set.plans["b"].adapters[0].rank, second.step, budget.step] == [2, 4, 4]


def test_adapters_can_be_disabled_whichever_is_active(plain: ac.AdaptedModel) -> None:
    base = plain(X)
    plain.add_adapter("b")
    randomize(plain)
    plain.use("b")
    with plain.disable_adapters():
        assert torch.equal(plain(X), base)
    assert not torch.allclose(plain(X), base)


def test_one_onnx_file_serves_each(plain: ac.AdaptedModel, tmp_path: Path) -> None:
    plain.add_adapter("b", config=ac.AdapterConfig(sites="up", rank=3))
    randomize(plain)
    ac.export_onnx(plain.eval(), tmp_path / "model.onnx", (X,), adapters="runtime")
    served = ac.OnnxAdapters(tmp_path / "model.onnx")
    for name in plain.adapter_names:
        served.load(name, ac.save_onnx_adapter(plain, tmp_path / f"{name}.onnx_adapter", name=name))
    for name in plain.adapter_names:
        plain.use(name)
        (found,) = served.run({served.session.get_inputs()[0].name: X.numpy()}, adapter=name).values()
        torch.testing.assert_close(torch.from_numpy(found), plain(X).detach(), rtol=1e-5, atol=1e-5)
