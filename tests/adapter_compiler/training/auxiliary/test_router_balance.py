"""The load-balancing loss is that of the Switch Transformer, acts through a hook, and a run resumes bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.integrations import shard
from tests.adapter_compiler.training.helpers import assert_same, snapshot
from tests.ranks import run_ranks

X = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(0))


def make(kind: str = "lora", *, dtype: torch.dtype = torch.float32, **options: Any) -> ac.AdaptedModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 8)).to(dtype)
    mixture = ac.Mixture(**{"experts": 4, "top_k": 1, **options})
    config = ac.AdapterConfig(kind=kind, rank=8, mixture=mixture)
    return ac.compile_with_adapters(model, (X.to(dtype),), config=config)


def switch_loss(p: Tensor, top_k: int) -> Tensor:
    """Equations 4 to 6 without α, in a loop over tokens and experts."""
    T, N = p.shape
    f = [0.0] * N
    for t in range(T):
        for i in sorted(range(N), key=lambda i: -float(p[t, i].detach()))[:top_k]:
            f[i] += 1 / (T * top_k)
    return N * sum((f[i] * p[:, i].sum() / T for i in range(N)), start=p.new_zeros(()))


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_loss_is_that_of_the_paper(top_k: int) -> None:
    p = torch.randn(10, 4, dtype=torch.float64).softmax(-1)
    chosen = torch.zeros_like(p).scatter(-1, p.topk(top_k).indices, 1.0)
    torch.testing.assert_close(ac.load_balancing_loss(p, chosen), switch_loss(p, top_k))
    uniform = torch.full((8, 4), 0.25, dtype=torch.float64)
    assert float(ac.load_balancing_loss(uniform, torch.eye(4, dtype=torch.float64).repeat(2, 1))) == pytest.approx(1)


@pytest.mark.parametrize("top_k", [None, 1, 2])
def test_the_hook_adds_its_gradient_and_nothing_else(top_k: int | None) -> None:
    adapted = make(dtype=torch.float64, top_k=top_k)
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1.0)
    balance = ac.RouterBalance(adapted, optimizer, weight=0.3)
    before = {name: p.detach().clone() for name, p in adapted.adapters.named_parameters()}
    x = X.double()
    adapted(x)
    adapted(2 * x)  # two calls are averaged
    optimizer.step()
    router = before["0.weight.router"].requires_grad_()
    losses = [switch_loss((scale * x.reshape(-1, 8) @ router.T).softmax(-1), top_k or 1) for scale in (1, 2)]
    expected = torch.stack(losses).mean()
    (0.3 * expected).backward()
    assert balance.loss["0.weight"] == pytest.approx(float(expected.detach()))
    assert sum(balance.shares["0.weight"]) == pytest.approx(1)
    for name, parameter in adapted.adapters.named_parameters():
        if name == "0.weight.router":
            torch.testing.assert_close(parameter, router - router.grad)  # type: ignore[operator]
        elif not name.endswith("router"):
            assert torch.equal(parameter, before[name])
    balance.detach()
    adapted(x)
    optimizer.step()
    assert torch.equal(parameter, dict(adapted.adapters.named_parameters())[name])


def test_calls_in_eval_mode_and_without_gradients_do_not_count() -> None:
    adapted = make()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1.0)
    balance = ac.RouterBalance(adapted, optimizer)
    adapted.eval()(X)
    with torch.no_grad():
        adapted.train()(X)
    optimizer.step()
    assert balance.loss == {}


def test_routers_that_favor_one_expert_become_even() -> None:
    adapted = make()
    with torch.no_grad():
        for name, parameter in adapted.adapters.named_parameters():
            if name.endswith("router"):
                parameter.zero_()[0] = 0.3
    x = X.abs() + 0.1  # so that the first expert has all tokens
    optimizer = torch.optim.Adam(adapted.trainable_parameters(), lr=0.02)
    balance = ac.RouterBalance(adapted, optimizer, weight=1.0)
    largest = []
    for _ in range(60):
        adapted(x).sum().mul(0).backward()
        optimizer.step()
        optimizer.zero_grad()
        largest.append(max(balance.shares["0.weight"]))
    assert largest[0] == 1
    assert largest[-1] < 0.7


def test_measured_routing_is_the_mean_of_the_gates_and_fixes_them() -> None:
    adapted = make(top_k=None)
    found = ac.measure_routing(adapted, [X, 2 * X], lambda model, x: model(x))
    router = adapted.adapters.get_parameter("0.weight.router")
    p = torch.cat([X, 2 * X]).reshape(-1, 8) @ router.T
    torch.testing.assert_close(torch.tensor(found["0.weight"]), p.softmax(-1).mean(0).detach())
    adapted.fix_routing(found, name="mean")


def train(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    adapted.train()
    for step in range(start, stop):
        torch.manual_seed(step)
        x = torch.randn(4, 3, 8)
        (adapted(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("router", ["site", "shared"])
def test_a_resumed_run_is_equal_bit_for_bit(router: str, tmp_path: Path) -> None:
    def begin(seed: int) -> tuple[ac.AdaptedModel, torch.optim.Optimizer, ac.RankBudget]:
        adapted = make("svd", router=router)
        if seed:
            with torch.no_grad():
                for parameter in adapted.adapters.parameters():
                    parameter.normal_()
        optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
        ac.RouterBalance(adapted, optimizer)
        schedule = ac.BudgetSchedule(target_rank=4, total_steps=12, warmup_steps=2, final_steps=4)
        return adapted, optimizer, ac.RankBudget(adapted, optimizer, schedule)

    whole, optimizer, budget = begin(0)
    train(whole, optimizer, 0, 12)
    expected = snapshot(whole, optimizer, budget)
    stopped, optimizer, budget = begin(0)
    train(stopped, optimizer, 0, 5)
    ac.save_training_state(tmp_path / "state", stopped, optimizer, budget=budget)
    resumed, optimizer, budget = begin(1)
    ac.load_training_state(tmp_path / "state", resumed, optimizer, budget=budget)
    train(resumed, optimizer, 5, 12)
    assert_same(snapshot(resumed, optimizer, budget), expected)
    assert budget.live_triplets == 8


def test_a_loss_scale_applies_to_the_hook_too() -> None:
    found = []
    for is_scaled in (False, True):
        adapted = make()
        optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1.0)
        ac.RouterBalance(adapted, optimizer, weight=0.5)
        loss = adapted(X).square().mean()
        if is_scaled:
            scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
        else:
            loss.backward()
            optimizer.step()
        found.append(adapted.adapters.get_parameter("0.weight.router").detach())
    torch.testing.assert_close(*found)


def test_what_cannot_be_balanced_is_refused() -> None:
    plain = ac.compile_with_adapters(nn.Sequential(nn.Linear(8, 8)), (X,))
    optimizer = torch.optim.SGD(plain.trainable_parameters(), lr=1.0)
    with pytest.raises(ConfigError, match=r"RouterBalance: the adapter 'default' has no router"):
        ac.RouterBalance(plain, optimizer)
    with pytest.raises(ConfigError, match=r"measure_routing: the adapter 'default' has no router"):
        ac.measure_routing(plain, [X], lambda model, x: model(x))
    adapted = make()
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=1.0)
    with pytest.raises(ConfigError, match=r"RouterBalance\(weight=-1\)"):
        ac.RouterBalance(adapted, optimizer, weight=-1)
    with pytest.raises(ConfigError, match=r"RouterBalance\(adapted=...\) is a Linear"):
        ac.RouterBalance(nn.Linear(2, 2), optimizer)
    with pytest.raises(ConfigError, match="measure_routing: no call ran a router"):
        ac.measure_routing(adapted, [], lambda model, x: model(x))
    balance = ac.RouterBalance(adapted, optimizer)
    adapted.fix_routing([1, 0, 0, 0], name="one")
    adapted.use("one")
    adapted(X).sum().backward()
    with pytest.raises(ConfigError, match=r"belongs to the adapter 'default', but 'one' is active"):
        optimizer.step()
    balance.detach()


class Skips(nn.Module):
    """Its second layer runs if the first value is positive."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).tanh()
        result: Tensor = y + self.second(y) if float(x.flatten()[0]) > 0 else y
        return result


def train_on_ranks(kind: str) -> None:
    """Each rank has batches of its own, of which the second router sees those of one rank in the first step."""

    def adapt() -> ac.AdaptedModel:
        torch.manual_seed(0)
        config = ac.AdapterConfig(kind="lora", rank=6, mixture=ac.Mixture(experts=3, top_k=1))
        return ac.compile_with_adapters(Skips(), (X.abs(),), config=config)

    found, alone = adapt(), adapt()
    model: Any = DistributedDataParallel(found, find_unused_parameters=True) if kind == "ddp" else shard(found)
    called = model if kind == "ddp" else found
    ranks = list(range(dist.get_world_size()))
    for one, call, parts in ((found, called, [dist.get_rank()]), (alone, alone, ranks)):
        optimizer = torch.optim.SGD(one.trainable_parameters(), lr=0.5)
        balance = ac.RouterBalance(one, optimizer, weight=0.5)
        for step in range(3):
            for part in parts:
                x = torch.randn(6, 4, 8, generator=torch.Generator().manual_seed(10 * step + part)).abs()
                x[0, 0, 0] *= -1 if (step == 0 and part == 0) or step == 1 else 1
                (call(x).square().mean() / len(parts)).backward()
            optimizer.step()
            assert ("second.weight" in balance.loss) is (step == 2 or (step == 0 and parts != [0]))
            optimizer.zero_grad()
    pairs = zip(found.adapters.named_parameters(), alone.adapters.named_parameters(), strict=True)
    for (name, mine), (_, its) in pairs:
        torch.testing.assert_close(mine, its, msg=name)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_balance_as_one_process_with_all_their_calls(kind: str) -> None:
    run_ranks(2, train_on_ranks, kind)
