"""A sum of adapters is found on a few examples: known weights are recovered, and the model is left as it was."""

from __future__ import annotations

import copy
import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError, MissingDependencyError
from tests.adapter_compiler.training.models import Net

NAMES = ("default", "second", "third")


def make(kind: str = "lora", **options: Any) -> ac.AdaptedModel:
    torch.manual_seed(0)
    config = ac.AdapterConfig(rank=2, kind=kind, **options)
    adapted = ac.compile_with_adapters(Net(), config=config)
    for name in NAMES[1:]:
        adapted.add_adapter(name)
    with torch.no_grad():
        for name in NAMES:
            for parameter in adapted.parameters_of_adapter(name).parameters():
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return adapted


def make_examples(adapted: ac.AdaptedModel, weights: dict[str, float]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """What the sum with these weights computes."""
    adapted.combine(weights, name="truth")
    adapted.eval().use("truth")
    xs = torch.randn(2, 24, 6)
    with torch.no_grad():
        batches = [(x, adapted(x)) for x in xs]
    adapted.use("default")
    adapted.remove_adapter("truth")
    return batches


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    assert not model.training and not torch.is_grad_enabled()
    random.random()
    value: torch.Tensor = (model(batch[0]) - batch[1]).square().mean()
    return value


def read_numpy() -> list[int]:
    state: Any = np.random.get_state()
    return [*state[1].tolist(), *state[2:]]


def test_known_weights_are_recovered() -> None:
    adapted = make()
    truth = {"default": 0.9, "second": -0.7, "third": 0.4}
    batches = make_examples(adapted, truth)
    found = ac.find_combination(adapted, loss, batches, name="found", l1=0.0, trials=300)
    assert found.loss < 1e-5 < min(found.base_loss, *found.single_losses.values())
    for name, weight in truth.items():
        assert abs(found.weights[name] - weight) < 0.05
    adapted.eval().use("found")
    for x, y in batches:
        torch.testing.assert_close(adapted(x), y, rtol=0, atol=2e-2)


def test_losses_are_those_of_the_adapters_alone() -> None:
    adapted = make()
    batches = make_examples(adapted, {"default": 1.0, "third": 0.5})
    found = ac.find_combination(adapted, loss, batches, name="found", trials=10)
    assert found.trials == 10
    adapted.eval()
    with torch.no_grad():
        for name in NAMES:
            adapted.use(name)
            alone = sum(float(loss(adapted, batch)) for batch in batches) / 2
            assert found.single_losses[name] == pytest.approx(alone, rel=1e-4)
        with adapted.disable_adapters():
            base = sum(float(loss(adapted, batch)) for batch in batches) / 2
    assert found.base_loss == pytest.approx(base, rel=1e-4)
    assert found.loss <= min(found.base_loss, *found.single_losses.values()) + 0.05 * 3
    assert "without adapters" in str(found)


def test_the_l1_term_leaves_out_what_does_not_help() -> None:
    adapted = make()
    batches = make_examples(adapted, {"default": 0.8})
    found = ac.find_combination(adapted, loss, batches, name="found", l1=0.02, trials=300)
    assert abs(found.weights["default"]) > 0.3
    assert max(abs(found.weights["second"]), abs(found.weights["third"])) < 0.05


def test_the_model_is_left_as_it_was() -> None:
    adapted = make(trainable=("head*",))
    adapted.use("second")
    batches = make_examples(adapted, {"default": 0.8})
    adapted.use("second")
    adapted.train()
    adapted(torch.randn(4, 6)).sum().backward()
    before = copy.deepcopy(adapted.state_dict())
    gradients = {name: p.grad for name, p in adapted.named_parameters()}
    states = torch.get_rng_state(), random.getstate(), read_numpy()
    options: dict[str, Any] = {"tensors_from": "second", "adapters": ["default", "third"], "rank": 1, "trials": 12}
    first = ac.find_combination(adapted, loss, batches, name="found", **options)
    assert adapted.training and adapted.active_adapter == "second"
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert read_numpy() == states[2]
    assert all(p.grad is gradients[name] for name, p in adapted.named_parameters() if name in gradients)
    after = adapted.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    assert max(adapter.rank for adapter in adapted.adapter_set.plans["found"]) == 1
    again = ac.find_combination(adapted, loss, batches, name="again", **options)
    assert again == first


def test_a_model_that_counts_its_calls_is_left_as_it_was() -> None:
    adapted = make()
    adapted.module.calls = 0  # type: ignore[assignment]
    adapted.module.register_buffer("seen", torch.zeros(()))
    batches = make_examples(adapted, {"default": 0.8})

    def count(model: ac.AdaptedModel, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        inner: Any = model.module
        inner.calls += 1
        inner.seen.add_(1)
        return loss(model, batch)

    ac.find_combination(adapted, count, batches, name="found", trials=7)  # type: ignore[arg-type]
    assert adapted.module.calls == 0
    assert adapted.module.seen == 0


def test_a_loss_that_fails_leaves_the_model_as_it_was() -> None:
    adapted = make().train()

    def fail(model: nn.Module, batch: Any) -> torch.Tensor:
        raise RuntimeError("no such batch")

    with pytest.raises(RuntimeError, match="no such batch"):
        ac.find_combination(adapted, fail, [1], name="found")
    assert adapted.adapter_names == NAMES
    assert adapted.active_adapter == "default" and adapted.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapters": ["default"]}, "expected two or more different adapters"),
        ({"adapters": ["default", "default"]}, "expected two or more different adapters"),
        ({"adapters": "default"}, "expected a list of names"),
        ({"adapters": ["default", "other"]}, "there is no adapter 'other'"),
        ({"name": "second"}, "there is an adapter 'second' already"),
        ({"bound": 0}, r"bound=0\): expected a positive number"),
        ({"l1": -1}, r"l1=-1\): expected a number of 0 or more"),
        ({"trials": 5}, r"trials=5\): expected an integer of at least 6"),
        ({"batches": []}, "batches is empty"),
        ({"loss": lambda model, batch: torch.tensor(float("nan"))}, "is inf or nan, expected a finite one"),
    ],
)
def test_what_cannot_work_is_refused(options: dict[str, Any], message: str) -> None:
    adapted = make()
    given = {"loss": loss, "batches": [(torch.randn(2, 6), torch.zeros(2, 3))], "name": "found", **options}
    with pytest.raises(ConfigError, match=message):
        ac.find_combination(adapted, given.pop("loss"), given.pop("batches"), **given)
    assert adapted.adapter_names == NAMES


def test_dora_cannot_be_added() -> None:
    with pytest.raises(ConfigError, match="whose update depends on the frozen weight"):
        ac.find_combination(make("dora"), loss, [(torch.randn(2, 6), torch.zeros(2, 3))], name="found")


def test_without_cma_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    with pytest.raises(MissingDependencyError, match=r"adapter-compiler\[compose\]"):
        ac.find_combination(make(), loss, [(torch.randn(2, 6), torch.zeros(2, 3))], name="found")
