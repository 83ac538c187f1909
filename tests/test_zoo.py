"""The zoo is large enough, well described, imported lazily, and its models run."""

from __future__ import annotations

import collections
import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import ZooEntry, entries, find_tensors, loss_of
from tests.zoo.architectures import ARCHITECTURES
from tests.zoo.awkward import AWKWARD
from tests.zoo.traits import TRAITS

FAST = ("bert", "gpt2-cached", "t5", "mixtral", "mamba", "vit", "wav2vec2", "clip", "patchtst")
OTHERS = tuple(entry for entry in ARCHITECTURES if entry.name not in FAST)


def assert_runs(entry: ZooEntry, *, training: bool) -> None:
    """At both sizes: finite outputs, a finite loss and, in training, a gradient for some parameter."""
    torch.manual_seed(0)
    model = entry.build().train(training)
    for args, kwargs in (entry.example(), entry.other_example()):
        output = model(*args, **kwargs)
        tensors = [tensor for tensor in find_tensors(output) if tensor.is_floating_point()]
        assert tensors
        assert not any(tensor.isnan().any() for tensor in tensors)
        loss = loss_of(output)
        assert loss.isfinite()
        if training:
            loss.backward()
            assert any(parameter.grad is not None for parameter in model.parameters())


def test_size_of_the_catalog() -> None:
    groups = collections.Counter(entry.group for entry in entries())
    assert sum(groups.values()) - groups["awkward"] == len(ARCHITECTURES) >= 74
    assert groups["awkward"] == len(AWKWARD) >= 52
    assert len(groups) == 10


def test_names_are_unique() -> None:
    counts = collections.Counter(entry.name for entry in (*ARCHITECTURES, *AWKWARD))
    assert [name for name, count in counts.items() if count > 1] == []


def test_every_entry_is_described_by_known_traits() -> None:
    assert all(entry.description for entry in entries())
    assert set().union(*(entry.traits for entry in entries())) == set(TRAITS)


def test_choosing_entries() -> None:
    assert [entry.name for entry in entries(names=["t5", "bert"])] == ["t5", "bert"]
    assert [entry.name for entry in entries("encoder", names=["t5", "bert"])] == ["bert"]
    assert {entry.group for entry in entries("moe")} == {"moe"}
    with pytest.raises(KeyError, match="no such"):
        entries(names=["no such"])
    with pytest.raises(KeyError, match="no such"):
        entries("no such")


def test_listing_imports_no_architecture() -> None:
    code = "import sys; from tests.zoo import entries; print(len(entries()), 'transformers' in sys.modules)"
    listed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert listed.stdout.split() == [str(len(entries())), "False"]


@pytest.mark.parametrize("name", ["bert", "hypernetwork", "shaped-noise"])
def test_a_seed_fixes_weights_and_inputs(name: str) -> None:
    (entry,) = entries(names=[name])
    drawn: list[list[Tensor]] = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.append([*entry.build().state_dict().values(), *find_tensors(entry.example())])
    assert all(torch.equal(first, second) for first, second in zip(*drawn, strict=True))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [entry.name for entry in AWKWARD] + list(FAST))
def test_runs(name: str, training: bool) -> None:
    (entry,) = entries(names=[name])
    assert_runs(entry, training=training)


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("name", [entry.name for entry in OTHERS])
def test_every_architecture_runs(name: str, training: bool) -> None:
    (entry,) = entries(names=[name])
    assert_runs(entry, training=training)


@dataclasses.dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


X = torch.tensor([3.0, 4.0], requires_grad=True)


@pytest.mark.parametrize(
    ("output", "loss"),
    [
        (X, 12.5),
        ([X, {"a": X * 2, "b": None, "c": X.detach()}], 12.5 + 50.0),
        (Output(logits=X), 12.5),
        (Output(logits=X, loss=X.sum()), 7.0),
        ({"loss": X, "logits": X}, 3.5),
        ((X.long(), torch.complex(X, X)), 25.0),
    ],
)
def test_loss_of_any_output(output: Any, loss: float) -> None:
    assert loss_of(output).item() == pytest.approx(loss)


def test_loss_of_nothing_to_differentiate() -> None:
    with pytest.raises(ValueError, match="requires grad"):
        loss_of({"y": X.detach(), "n": 3, "module": nn.Linear(2, 2)})
