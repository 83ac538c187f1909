"""The parts of the demo: data, model, training and measurements."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn import datasets

from adapter_compiler.cli.demo.data import LabeledImages, load_digits, rotate_and_invert
from adapter_compiler.cli.demo.measure import assert_same_accuracy, judge, measure_latency, run_on_onnxruntime
from adapter_compiler.cli.demo.model import DigitTransformer, split_into_patches
from adapter_compiler.cli.demo.options import DemoOptions
from adapter_compiler.cli.demo.training import adapt, pretrain
from adapter_compiler.errors import ConfigError, MissingDependencyError, VerificationError
from adapter_compiler.onnx import export_onnx


def ignore(loss: float, live: int | None) -> None:
    """A watcher that does nothing."""


def sort_rows(*parts: LabeledImages) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    rows = [torch.cat([16 * part.images.flatten(1), part.labels[:, None].float()], dim=1) for part in parts]
    table = torch.cat(rows).double().numpy()
    return table[np.lexsort(table.T)]


def test_the_split_is_every_digit_once() -> None:
    train, test = load_digits(3)
    assert (len(train), len(test)) == (1198, 599)
    pixels, labels = datasets.load_digits(return_X_y=True)
    everything = np.concatenate([pixels, labels[:, None]], axis=1)
    np.testing.assert_array_equal(sort_rows(train, test), everything[np.lexsort(everything.T)])


def test_the_seed_decides_the_split() -> None:
    assert torch.equal(load_digits(3)[1].images, load_digits(3)[1].images)
    assert not torch.equal(load_digits(3)[1].images, load_digits(4)[1].images)


def test_the_changed_task_is_a_quarter_turn_and_inverted() -> None:
    digits = load_digits(0)[1]
    changed = rotate_and_invert(digits)
    for image, other in zip(digits.images[:5].numpy(), changed.images[:5].numpy(), strict=True):
        np.testing.assert_array_equal(other, 1 - np.rot90(image))
    assert torch.equal(changed.labels, digits.labels)


def test_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'adapter-compiler\[demo\]'"):
        load_digits(0)


def test_patches_are_those_of_unfold() -> None:
    images = torch.randn(3, 8, 8)
    torch.testing.assert_close(split_into_patches(images), F.unfold(images[:, None], 2, stride=2).transpose(1, 2))


def test_the_model_knows_the_position_of_a_patch() -> None:
    torch.manual_seed(0)
    model = DigitTransformer().eval()
    image = torch.zeros(1, 8, 8)
    image[0, 0, 0] = 1
    assert model(image).shape == (1, 10)
    assert not torch.allclose(model(image), model(image.flip(2)), atol=1e-4)


@pytest.fixture
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_seed_decides_both_trainings() -> None:
    train = load_digits(0)[0]
    options = DemoOptions(steps=20, pretraining_steps=20)
    first, again, other = (
        pretrain(train, o, ignore) for o in (options, options, DemoOptions(seed=1, steps=20, pretraining_steps=20))
    )
    torch.testing.assert_close(first.state_dict(), again.state_dict(), rtol=0, atol=0)
    assert not torch.equal(first.head.weight, other.head.weight)
    before = {name: value.clone() for name, value in first.state_dict().items()}
    runs = [adapt(first, train, options, ignore) for _ in range(2)]
    assert runs[0].losses == runs[1].losses
    assert len(set(runs[0].losses)) == 20
    torch.testing.assert_close(first.state_dict(), before, rtol=0, atol=0)


@pytest.mark.usefixtures("one_thread")
def test_adapting_ends_at_the_target() -> None:
    train = load_digits(0)[0]
    seen: list[tuple[float, int | None]] = []
    options = DemoOptions(steps=30, target_rank=1)
    result = adapt(DigitTransformer(), train, options, lambda loss, live: seen.append((loss, live)))
    assert (options.rank, result.initial_triplets) == (2, 2 * 26)
    assert result.budget.live_triplets == 26
    assert seen[-1] == (result.losses[-1], 26)
    assert len(seen) == 30
    assert not result.model.training


def test_answers_are_counted() -> None:
    digits = LabeledImages(images=torch.zeros(4, 8, 8), labels=torch.tensor([0, 1, 2, 3]))
    outcome = judge(torch.eye(10)[[0, 1, 2, 4]], digits)
    assert (outcome.correct, outcome.accuracy) == (3, 0.75)


def test_unequal_accuracy_is_an_error() -> None:
    digits = LabeledImages(images=torch.zeros(2, 8, 8), labels=torch.tensor([0, 1]))
    good, bad = (judge(torch.eye(10)[rows], digits) for rows in ([0, 1], [0, 2]))
    assert_same_accuracy(good, good, good)
    with pytest.raises(VerificationError, match="the adapted model classifies 2 correctly, the folded model 1, the"):
        assert_same_accuracy(good, bad, good)
    with pytest.raises(VerificationError, match="the exported model 1; expected equal numbers"):
        assert_same_accuracy(good, good, bad)


def test_an_exported_model_is_run_and_timed(tmp_path: Path) -> None:
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    images = torch.randn(5, 8, 8)
    path = export_onnx(linear, tmp_path / "model.onnx", (images,)).path
    torch.testing.assert_close(run_on_onnxruntime(path, images), linear(images).detach())
    first, second = measure_latency([path, path], images, repeats=3)
    assert first > 0
    assert second > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 3}, r"steps=3\): expected an integer of at least 20"),
        ({"pretraining_steps": 0}, r"pretraining_steps=0\): expected an integer of at least 20"),
        ({"seed": -1}, r"seed=-1\): expected an integer of at least 0"),
        ({"target_rank": 0}, r"target_rank=0\): expected a finite number >= 0.5"),
        ({"target_rank": 17}, r"target_rank=17\): expected at most 16"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DemoOptions(**options)  # type: ignore[arg-type]
