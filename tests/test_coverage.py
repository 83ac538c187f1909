"""A part of what benchmarks/coverage.py runs: models that capture whole, in regions, and hardly at all."""

from __future__ import annotations

import pytest

from tests.zoo import entries
from tests.zoo.checks import Outcome, check_entry

FAST = (
    "data-dependent-branch",
    "layer-drop",
    "scripted",
    "hooked-spectral-norm",
    "parametrizations",
    "replaced-buffer",
    "checkpoint-reentrant",
    "custom-autograd",
    "inner-gradient",
    "in-place",
    "bilinear",
    "autocast-region",
)
OTHERS = ("early-exit", "padded-encoder", "python-counter", "packed-qkv", "unet", "einsum", "dual-dtype", "bert", "t5")
CHECKS = ["compile", "identity_eval", "identity_train", "outputs_eval", "outputs_train", "other_size"]
CHECKS += ["pruning", "fold", "reach"]


def check(name: str) -> Outcome:
    (entry,) = entries(names=[name])
    outcome = check_entry(entry)
    assert {check: getattr(outcome, check) for check in CHECKS} == dict.fromkeys(CHECKS, "")
    missed = [reason for reason in outcome.unreachable if "the captured call does not use it" not in reason]
    assert missed == []
    return outcome


@pytest.mark.parametrize("name", FAST)
def test_every_check_holds(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_every_check_holds_on_larger_models(name: str) -> None:
    outcome = check(name)
    assert (outcome.whole_train and outcome.whole_eval) or outcome.reasons
