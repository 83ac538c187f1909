"""``semantics="peft"`` does the same as peft's AdaLoRA at each step, from the same start and on the same data.

peft multiplies Q by λ before the product with x and divides α by rank + 1e-5, so the two agree to rounding and
not bit for bit. Two properties of peft are excluded from the comparison: it marks its rank counters as trainable,
so that an optimizer over everything that requires grad changes the scale; and it adds the regularizer in
``AdaLoraModel.forward``, which ``PeftModel`` without a task type does not call, so the test calls it directly.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

import adapter_compiler as ac

STEPS, WARMUP, FINAL, INTERVAL = 60, 5, 15, 4
RANK, TARGET = 6, 3
LAYERS = ("first", "second", "third")


class Net(nn.Module):
    """Three linear layers of different widths; returns its loss as transformers' models do, which peft looks for."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 12)
        self.second = nn.Linear(12, 10, bias=False)
        self.third = nn.Linear(10, 7)

    def forward(self, x: Tensor, labels: Tensor) -> SequenceClassifierOutput:
        logits = self.third(torch.tanh(self.second(torch.relu(self.first(x)))))
        return SequenceClassifierOutput(loss=nn.functional.mse_loss(logits, labels), logits=logits)


@dataclasses.dataclass(kw_only=True)
class Pair:
    """One model with peft's AdaLoRA and with ours, with the same values; peft's type hints are incomplete."""

    theirs: Any
    ours: ac.AdaptedModel
    batches: list[dict[str, Tensor]]

    def their_parameters(self, layer: str) -> dict[str, nn.Parameter]:
        found = self.theirs.base_model.model.get_submodule(layer)
        return {"P": found.lora_B["default"], "lam": found.lora_E["default"], "Q": found.lora_A["default"]}

    def our_parameters(self, layer: str) -> dict[str, nn.Parameter]:
        return {name: self.ours.adapters.get_parameter(f"{layer}.weight.{name}") for name in ("P", "lam", "Q")}

    def largest_difference(self, name: str) -> float:
        pairs = ((self.their_parameters(layer)[name], self.our_parameters(layer)[name]) for layer in LAYERS)
        return max(float((theirs.detach().view_as(ours) - ours.detach()).abs().max()) for theirs, ours in pairs)


def make_pair(dtype: torch.dtype, *, gamma: float, fused: bool, seed: int = 0) -> Pair:
    torch.manual_seed(seed)
    net = Net().to(dtype)
    batches = [{"x": torch.randn(16, 8, dtype=dtype), "labels": torch.randn(16, 7, dtype=dtype)} for _ in range(STEPS)]
    their_config = peft.AdaLoraConfig(
        target_modules=list(LAYERS),
        init_r=RANK,
        target_r=TARGET,
        lora_alpha=12,
        tinit=WARMUP,
        tfinal=FINAL,
        deltaT=INTERVAL,
        total_step=STEPS,
        orth_reg_weight=gamma,
    )
    theirs: Any = peft.get_peft_model(copy.deepcopy(net), their_config)
    layer = theirs.base_model.model.get_submodule("first")
    scale = layer.scaling["default"] / float(layer.ranknum["default"].detach() + 1e-5)
    our_config = ac.AdapterConfig(rank=RANK, alpha=scale * RANK, gamma=gamma, fused=fused)
    ours = ac.compile_with_adapters(net, example_kwargs=batches[0], config=our_config)
    pair = Pair(theirs=theirs, ours=ours, batches=batches)
    with torch.no_grad():
        for name in LAYERS:
            source = pair.their_parameters(name)
            for letter, parameter in pair.our_parameters(name).items():
                parameter.copy_(source[letter].view_as(parameter))
    return pair


def train_side_by_side(pair: Pair, clip: float | None = None) -> Iterator[tuple[int, ac.RankBudget]]:
    """Yield after each step of both, with the step's number from 0."""
    options: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.01}
    their_parameters = [p for layer in LAYERS for p in pair.their_parameters(layer).values()]
    their_optimizer = torch.optim.AdamW(their_parameters, **options)
    our_optimizer = torch.optim.AdamW(pair.ours.trainable_parameters(), **options)
    schedule: dict[str, Any] = {"target_r": TARGET, "total_step": STEPS, "tinit": WARMUP, "tfinal": FINAL}
    schedule |= {"deltaT": INTERVAL, "semantics": "peft"}
    budget = ac.RankBudget(pair.ours, our_optimizer, ac.BudgetSchedule(**schedule))
    for step, batch in enumerate(pair.batches):
        pair.theirs.base_model(**batch).loss.backward()
        pair.ours(**batch).loss.backward()
        if clip is not None:
            norm = torch.nn.utils.clip_grad_norm_(their_parameters, clip)
            torch.nn.utils.clip_grad_norm_(pair.ours.trainable_parameters(), clip)
            assert norm > clip, "the case must clip"
        their_optimizer.step()
        pair.theirs.base_model.update_and_allocate(step)
        our_optimizer.step()
        their_optimizer.zero_grad()
        our_optimizer.zero_grad()
        yield step, budget


def assert_same_masks(pair: Pair, budget: ac.RankBudget, step: int) -> None:
    """Check that the same λ are zero, and after a masking that they are those that peft recorded as pruned."""
    pattern = pair.theirs.peft_config["default"].rank_pattern
    is_masking = bool(budget.history) and budget.history[-1].step == step
    for layer in LAYERS:
        theirs, ours = pair.their_parameters(layer)["lam"], pair.our_parameters(layer)["lam"]
        assert torch.equal(theirs.detach().flatten() != 0, ours.detach() != 0), (step, layer)
        if is_masking or budget.is_frozen:
            kept = pattern[f"{layer}.lora_E.default"]
            assert (ours.detach() != 0).tolist() == kept, (step, layer)
            assert budget.ranks()[f"{layer}.weight"] == sum(kept)


def assert_parity(pair: Pair, tolerance: float, clip: float | None = None) -> None:
    maskings = 0
    for step, budget in train_side_by_side(pair, clip):
        assert pair.largest_difference("lam") <= tolerance, step
        assert_same_masks(pair, budget, step)
        maskings = len(budget.history)
    assert [record.step for record in budget.history] == [8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 45]
    assert maskings == 11
    assert budget.live_triplets == budget.budget == TARGET * len(LAYERS)
    ranks = set(budget.ranks().values())
    assert len(ranks) > 1, "a uniform allocation would show nothing"
    for name in ("P", "Q"):
        assert pair.largest_difference(name) <= 100 * tolerance


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("gamma", [0.0, 0.5], ids=["plain", "regularized"])
def test_whole_schedule_in_float64(gamma: float, fused: bool) -> None:
    assert_parity(make_pair(torch.float64, gamma=gamma, fused=fused), 1e-9)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_whole_schedule_with_clipping_in_float64(fused: bool) -> None:
    """Without the regularizer: peft clips its gradient together with the loss's, and we add it after clipping."""
    assert_parity(make_pair(torch.float64, gamma=0.0, fused=fused), 1e-9, clip=1e-4)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("gamma", [0.0, 0.5], ids=["plain", "regularized"])
def test_whole_schedule_in_float32(gamma: float, fused: bool) -> None:
    assert_parity(make_pair(torch.float32, gamma=gamma, fused=fused), 1e-5)


def test_the_comparison_can_fail() -> None:
    """A slightly different regularizer is noticed within a few steps."""
    pair = make_pair(torch.float64, gamma=0.5, fused=True)
    pair.theirs.peft_config["default"].orth_reg_weight = 0.5001
    differences = [pair.largest_difference("lam") for _ in train_side_by_side(pair)]
    assert max(differences) > 1e-7


def test_equal_ranks_at_start_and_end_run_here_and_crash_there() -> None:
    """peft asks for the zeroth smallest score when nothing is to be pruned."""
    net, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)
    config = peft.AdaLoraConfig(target_modules=["0"], init_r=2, target_r=2, total_step=4, tfinal=1)
    theirs: Any = peft.get_peft_model(copy.deepcopy(net), config)
    theirs(x).sum().backward()
    with pytest.raises((RuntimeError, IndexError)):
        for step in range(4):
            theirs.base_model.update_and_allocate(step)

    ours = ac.compile_with_adapters(net, (x,), config=ac.AdapterConfig(rank=2))
    optimizer = torch.optim.AdamW(ours.trainable_parameters())
    budget = ac.RankBudget(ours, optimizer, ac.BudgetSchedule(target_rank=2, total_steps=4, semantics="peft"))
    for _ in range(4):
        ours(x).square().sum().backward()
        optimizer.step()
    assert budget.live_triplets == 2
    assert (ours.adapters.get_parameter("0.weight.lam") != 0).all()
