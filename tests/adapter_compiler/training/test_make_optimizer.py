"""Whole runs: learning, rank budgets, compaction, resuming, GradScaler, sharded parameters."""

from __future__ import annotations

import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError
from tests.adapter_compiler.training.helpers import assert_same, find_lambdas, make_adapted, set_gradients, snapshot
from tests.adapter_compiler.training.models import GatedNet, X

RULES = ("muon", "triplet")


def make(kind: str = "svd", rank: int = 4) -> ac.AdaptedModel:
    torch.manual_seed(0)
    return ac.compile_with_adapters(GatedNet().double(), (X,), config=ac.AdapterConfig(kind=kind, rank=rank))


def make_budget(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, **options: Any) -> ac.RankBudget:
    usual = {"target_rank": 2, "total_steps": 20, "warmup_steps": 2, "final_steps": 8, "interval": 2}
    return ac.RankBudget(adapted, optimizer, ac.BudgetSchedule(**usual | options))


def train(adapted: ac.AdaptedModel, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = (adapted(X) - X.flip(0)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["svd", "lora", "dora", "dora-svd"])
def test_it_learns(kind: str, rule: str) -> None:
    adapted = make(kind)
    losses = train(adapted, ac.make_optimizer(adapted, 0.02, rule=rule), 60)
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("rule", RULES)
def test_the_budget_is_kept_and_pruned_triplets_stay_as_they_are(rule: str) -> None:
    adapted = make()
    optimizer = ac.make_optimizer(adapted, 0.02, rule=rule)
    budget = make_budget(adapted, optimizer)
    train(adapted, optimizer, 13)
    assert budget.is_frozen
    parameters = adapted.adapters.keyed_parameters
    pruned = {site: lam == 0 for site, lam in find_lambdas(adapted).items()}
    assert sum(int(gone.sum()) for gone in pruned.values()) == 4 * 4 - 4 * 2
    before = {site: parameters[site, "P"].detach()[:, gone].clone() for site, gone in pruned.items()}
    for _ in range(5):
        train(adapted, optimizer, 1)
        for site, lam in find_lambdas(adapted).items():
            assert torch.equal(lam == 0, pruned[site])
    for site, gone in pruned.items():
        assert torch.equal(parameters[site, "P"].detach()[:, gone], before[site])


@pytest.mark.parametrize("rule", RULES)
def test_a_compacted_run_is_the_masked_run(rule: str) -> None:
    outputs = []
    for compact in (False, True):
        adapted = make()
        optimizer = ac.make_optimizer(adapted, 0.02, rule=rule)
        budget = make_budget(adapted, optimizer, compact=compact)
        train(adapted, optimizer, 20)
        assert sum(adapter.rank for adapter in adapted.plan) == (8 if compact else 16)
        assert budget.live_triplets == 8
        outputs.append(adapted(X).detach())
        for (_, name), parameter in adapted.adapters.keyed_parameters.items():
            state = optimizer.state.get(parameter, {})
            moments = [state[key] for key in ("momentum_buffer", "exp_avg", "exp_avg_sq") if key in state]
            assert len(moments) == (0 if not parameter.numel() else 2 if name == "lam" else 1)
            assert all(moment.shape == parameter.shape for moment in moments)
    torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("stop", [1, 7, 14])
def test_a_resumed_run_is_the_same_run(rule: str, stop: int, tmp_path: Path) -> None:
    """The run is compacted at step 12, so one of the stops is after that."""
    adapted = make()
    optimizer = ac.make_optimizer(adapted, 0.02, rule=rule, weight_decay=0.01)
    budget = make_budget(adapted, optimizer, compact=True)
    train(adapted, optimizer, stop)
    ac.save_training_state(tmp_path, adapted, optimizer, budget=budget)
    train(adapted, optimizer, 20 - stop)

    resumed = make()
    other = ac.make_optimizer(resumed, 0.5, rule=rule)
    its_budget = make_budget(resumed, other, compact=True)
    ac.load_training_state(tmp_path, resumed, other, budget=its_budget)
    train(resumed, other, 20 - stop)
    assert_same(snapshot(resumed, other, its_budget), snapshot(adapted, optimizer, budget))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["momentum_buffer", "exp_avg", "exp_avg_sq"])
def test_moments_of_another_shape_are_refused(rule: str, name: str, tmp_path: Path) -> None:
    adapted = make()
    optimizer = ac.make_optimizer(adapted, 0.02, rule=rule)
    train(adapted, optimizer, 2)
    state = next(state for state in optimizer.state.values() if name in state)
    shape, state[name] = tuple(state[name].shape), torch.zeros(5)
    ac.save_training_state(tmp_path, adapted, optimizer)
    resumed = make()
    other = ac.make_optimizer(resumed, 0.02, rule=rule)
    before = copy.deepcopy([resumed.state_dict(), other.state_dict()])
    with pytest.raises(
        CheckpointError, match=rf"{name} of adapters.* has shape \(5,\), expected {re.escape(str(shape))}"
    ):
        ac.load_training_state(tmp_path, resumed, other)
    assert_same([resumed.state_dict(), other.state_dict()], before)


def test_the_models_method_is_the_function() -> None:
    adapted, other = make(), make()
    options: dict[str, Any] = {"rule": "triplet", "other_lr": 0.01, "momentum": 0.7, "weight_decay": 0.1}
    one, its = adapted.make_optimizer(0.02, **options), ac.make_optimizer(other, 0.02, **options)
    assert type(one) is type(its) is ac.AdapterNormalized
    train(adapted, one, 3)
    train(other, its, 3)
    assert_same(adapted.state_dict(), other.state_dict())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_state_dict_keeps_every_bit(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    adapted = make_adapted(dtype=dtype)
    optimizer = ac.make_optimizer(adapted, 0.02)
    for _ in range(3):
        set_gradients(adapted)
        optimizer.step()
    copied = copy.deepcopy(adapted)
    other = ac.make_optimizer(copied, 0.02)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same(other.state_dict(), optimizer.state_dict())
    for one, its in zip(adapted.trainable_parameters(), copied.trainable_parameters(), strict=True):
        one.grad = torch.randn_like(one)
        its.grad = one.grad.clone()
    optimizer.step()
    other.step()
    assert_same(copied.state_dict(), adapted.state_dict())


def test_grad_scaler() -> None:
    adapted, plain = make(), make()
    optimizer, other = ac.make_optimizer(adapted, 0.02), ac.make_optimizer(plain, 0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    budget = make_budget(adapted, optimizer)
    before = copy.deepcopy([adapted.state_dict(), optimizer.state_dict()])
    for is_skipped in (True, False, False):
        scaler.scale((adapted(X) - X.flip(0)).square().mean()).backward()
        if is_skipped:
            gradient = adapted.trainable_parameters()[0].grad
            assert gradient is not None
            gradient.fill_(torch.inf)
        scaler.step(optimizer)
        scaler.update(1024.0)
        optimizer.zero_grad()
        if is_skipped:
            assert_same([adapted.state_dict(), optimizer.state_dict()], before)
    train(plain, other, 2)
    assert budget.step == 2
    torch.testing.assert_close(adapted(X), plain(X), rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore")  # torch warns about its own process group
@pytest.mark.parametrize("cls", [ac.AdapterMuon, ac.AdapterNormalized])
@pytest.mark.parametrize("dim", [0, 1])
def test_sharded_is_plain(mesh: DeviceMesh, cls: type[ac.AdapterMuon], dim: int) -> None:
    torch.manual_seed(0)
    values = {"left": torch.randn(6, 3), "right": torch.randn(3, 5), "other": torch.randn(4, 4)}
    plain = {role: nn.Parameter(value.clone()) for role, value in values.items()}
    sharded = {role: nn.Parameter(distribute_tensor(value, mesh, [Shard(dim)])) for role, value in values.items()}
    optimizers = [cls([{"params": [p], "role": role} for role, p in d.items()], 0.1) for d in (plain, sharded)]
    for _ in range(3):
        for role, parameter in plain.items():
            parameter.grad = torch.randn_like(parameter)
            sharded[role].grad = distribute_tensor(parameter.grad, mesh, [Shard(dim)])
        for optimizer in optimizers:
            optimizer.step()
    for role, parameter in plain.items():
        found: Any = sharded[role].detach()
        torch.testing.assert_close(found.full_tensor(), parameter.detach())
    state: Any = optimizers[1].state[sharded["left"]]["momentum_buffer"]
    assert state.placements == (Shard(dim),)
