"""A quarter of what benchmarks/coverage.py runs, of every group: models that are one graph, and that never are."""

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
AWKWARD = (
    "early-exit",
    "scalar-read",
    "batch-norms",
    "packed-qkv",
    "unet",
    "einsum",
    "dual-dtype",
    "padded-encoder",
    "python-counter",
    "grown-table",
    "hooked",
    "dataclass-output",
    "distribution-output",
    "through-numpy",
    "recovers",
    "tied-autoencoder",
    "flat-parameter",
    "unused-weight",
    "batch-of-one",
    "functional-call",
    "task-weights",
    "hypernetwork",
    "lazy",
    "masked-linear",
    "quantized",
    "star-arguments",
    "graph-convolution",
    "convolutions",
    "complex-weights",
    "click-model",
    "vector-quantized",
    "expert-stack",
    "siamese",
    "chain-tagger",
    "feature-tokens",
    "routed-experts",
    "packed-sequence",
)
ARCHITECTURES = (
    "fnet",
    "xlm",
    "electra",
    "deberta",
    "bert",
    "opt",
    "llama",
    "gpt-bigcode",
    "bart",
    "t5",
    "olmoe",
    "lfm2",
    "recurrent-gemma",
    "segformer",
    "vit",
    "resnet",
    "vit-mae",
    "sew",
    "whisper",
    "visual-bert",
    "siglip",
    "patchtst",
)
UNREACHABLE = ("the example does not use it", "TorchScript", "written into another tensor in place")
CHECKS = ["compile", "identity_eval", "identity_train", "outputs_eval", "outputs_train", "other_size"]
CHECKS += ["pruning", "fold", "reach"]


def check(name: str, *, graphs: bool = False) -> Outcome:
    (entry,) = entries(names=[name])
    outcome = check_entry(entry, graphs=graphs)
    assert {check: getattr(outcome, check) for check in CHECKS} == dict.fromkeys(CHECKS, "")
    missed = [reason for reason in outcome.unreachable if not any(known in reason for known in UNREACHABLE)]
    assert missed == []
    return outcome


@pytest.mark.parametrize("name", FAST)
def test_every_check_holds(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", (*ARCHITECTURES, *AWKWARD))
def test_every_check_holds_on_larger_models(name: str) -> None:
    check(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bert", "resnet", "early-exit"])
def test_a_call_is_one_graph_or_it_is_said_why_not(name: str) -> None:
    outcome = check(name, graphs=True)
    assert outcome.whole_train and outcome.whole_eval if name != "early-exit" else outcome.reasons
