"""Real architectures of transformers, small and random, through the whole pipeline with its public names only.

All tests use the same run of an architecture: compile, compare, train six steps while ranks are pruned,
fold, compare. Exports are compared with onnxruntime again, independently of the library's own check.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from tests.adapter_compiler.training.helpers import count_nonzero
from tests.zoo import ZooEntry, entries, find_tensors, loss_of
from tests.zoo.inputs import leave_out

QUICK = ("distilbert", "gpt2", "llama", "t5", "vit")
SLOW = ("albert", "bart", "bert", "clip", "deberta-v2", "modernbert", "qwen2", "roberta", "whisper")

#: Inputs that request a loss which fixes the graph. DeBERTa-v2's selects the given labels, so its shapes
#: depend on their values; CLIP's takes ``len()`` of the scores, which freezes the batch at the example's.
LEFT_OUT = {"deberta-v2": ("labels",), "clip": ("return_loss",)}

RANK, TARGET, STEPS = 4, 2, 6

Call = tuple[tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Outputs of two models that should agree, for one mode and one size."""

    name: str
    found: list[Tensor]
    expected: list[Tensor]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """The results of a run.

    `live` has, for each step, the budget, the number of live triplets, and the number of λ that are not zero.
    """

    adapted: ac.AdaptedModel
    folded: nn.Module
    calls: tuple[Call, Call]
    untrained: list[Case]
    trained: list[Case]
    base: list[Case]
    live: list[tuple[int, int, int]]


def find_entry(name: str) -> ZooEntry:
    (entry,) = entries(names=[name])
    return dataclasses.replace(entry, inputs=leave_out(entry.inputs, *LEFT_OUT.get(name, ())))


def call_model(model: nn.Module, call: Call, *, training: bool) -> list[Tensor]:
    """Outputs under a fixed random state; in eval mode without gradients, which decide on attention's kernel."""
    torch.manual_seed(5)
    with torch.set_grad_enabled(training):
        output = model.train(training)(*call[0], **call[1])
    return [tensor.detach().clone() for tensor in find_tensors(output)]


def compare(found: nn.Module, expected: nn.Module, calls: tuple[Call, Call]) -> list[Case]:
    return [
        Case(
            name=f"{'train' if training else 'eval'}, size {size}",
            found=call_model(found, call, training=training),
            expected=call_model(expected, call, training=training),
        )
        for training in (True, False)
        for size, call in enumerate(calls)
    ]


def train(adapted: ac.AdaptedModel, calls: tuple[Call, Call]) -> list[tuple[int, int, int]]:
    torch.manual_seed(1)
    adapted.train()
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=0.02)
    schedule = ac.BudgetSchedule(target_rank=TARGET, total_steps=STEPS, warmup_steps=1, final_steps=2, interval=1)
    budget = ac.RankBudget(adapted, optimizer, schedule)
    live = []
    for step in range(STEPS):
        args, kwargs = calls[step % 2]
        loss_of(adapted(*args, **kwargs)).backward()
        optimizer.step()
        optimizer.zero_grad()
        live.append((budget.budget, budget.live_triplets, count_nonzero(adapted)))
    return live


@functools.cache
def run(name: str) -> Outcome:
    torch.manual_seed(0)
    entry = find_entry(name)
    model = entry.build()
    calls = entry.example(), entry.other_example()
    adapted = ac.compile_with_adapters(model, *calls[0], config=ac.AdapterConfig(rank=RANK, alpha=RANK))
    untrained = compare(adapted, copy.deepcopy(model), calls)
    live = train(adapted, calls)
    folded = adapted.fold()
    trained = compare(adapted, folded, calls)
    return Outcome(
        adapted=adapted,
        folded=folded,
        calls=calls,
        untrained=untrained,
        trained=trained,
        base=compare(adapted, model, calls),
        live=live,
    )


architectures = pytest.mark.parametrize(
    "name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)


@architectures
def test_untrained_adapters_give_the_models_outputs_bit_for_bit(name: str) -> None:
    for case in run(name).untrained:
        assert len(case.found) == len(case.expected) > 0
        for found, expected in zip(case.found, case.expected, strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, msg=case.name)


@architectures
def test_the_budget_is_exact_after_every_masking(name: str) -> None:
    outcome = run(name)
    initial = sum(min(RANK, *site.shape) for site in outcome.adapted.sites)
    target = min(TARGET * len(outcome.adapted.sites), initial)
    assert len(outcome.adapted.sites) >= 8
    budgets = [budget for budget, _, _ in outcome.live]
    assert budgets[0] == initial
    assert budgets[3:] == [target] * 3
    assert initial > budgets[1] > budgets[2] >= target
    for budget, live, nonzero in outcome.live:
        assert live == budget
        assert 0 < nonzero <= live


@architectures
def test_folded_computes_what_was_trained(name: str) -> None:
    outcome = run(name)
    for case in outcome.trained:
        for found, expected in zip(case.found, case.expected, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5, equal_nan=True, msg=case.name)
    for case in outcome.base:
        pairs = zip(case.found, case.expected, strict=True)
        changes = [float((a - b).abs().nan_to_num().max()) for a, b in pairs if a.is_floating_point()]
        assert max(changes) > 1e-4, f"training changed nothing in {case.name}"


@architectures
def test_folded_is_the_users_class_with_its_keys(name: str) -> None:
    outcome = run(name)
    assert type(outcome.folded) is type(find_entry(name).build())
    assert list(outcome.folded.state_dict()) == list(outcome.adapted.module.state_dict())
    assert outcome.adapted.report().unused == ()


@pytest.mark.slow
@pytest.mark.parametrize("name", (*QUICK, *SLOW))
def test_exported_it_computes_the_same_on_onnxruntime(name: str, tmp_path: Path) -> None:
    outcome = run(name)
    args, kwargs = outcome.calls[0]
    report = ac.export_onnx(outcome.adapted, tmp_path / "model.onnx", args, kwargs)
    assert report.not_verified == ()
    assert report.max_abs_error < 1e-4
    session = onnxruntime.InferenceSession(str(report.path), providers=["CPUExecutionProvider"])
    inputs = [value.name for value in session.get_inputs()]
    outputs = [value.name for value in session.get_outputs()]
    for _, kwargs in outcome.calls:
        found = session.run(None, {key: kwargs[key].numpy() for key in inputs})
        with torch.no_grad():
            expected = outcome.folded.eval()(**kwargs)
        named = {key: value for key, value in zip(outputs, found, strict=True) if hasattr(expected, key)}
        assert named
        for key, value in named.items():
            assert np.isfinite(value).all()
            torch.testing.assert_close(torch.from_numpy(value), getattr(expected, key), rtol=1e-4, atol=1e-5)
