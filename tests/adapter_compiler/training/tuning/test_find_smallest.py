"""The smallest adapter, on a task whose right ranks are known: targets that differ from W by rank 3 and 1."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from adapter_compiler.training.tuning.spectrum import add_cut_adapter, count_values, find_spectrum
from tests.adapter_compiler.training.helpers import assert_same


class Two(nn.Module):
    """Two layers beside each other, and a bias that trains fully."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(12, 10, bias=False), nn.Linear(12, 8, bias=False)
        self.shift = nn.Parameter(torch.zeros(18))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.left(x), self.right(x)], dim=-1) + self.shift


#: The rank of the target's difference, by layer.
RIGHT = {"left.weight": 3, "right.weight": 1}


@dataclasses.dataclass
class Task:
    """A linear regression; W of the target differs from the model's by the right ranks, each part of about one size."""

    seed: int = 0
    calls: list[tuple[str, float]] = dataclasses.field(default_factory=list)
    per_example: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(100 + self.seed)
        self.model = Two().double()
        self.x = torch.randn(200, 12, dtype=torch.float64)
        parts = []
        for name, rank in RIGHT.items():
            weight = self.model.get_parameter(name).detach()
            U, V = (torch.linalg.qr(torch.randn(n, rank, dtype=torch.float64))[0] for n in weight.shape)
            parts.append(self.x @ (weight + U @ V.T).T)
        self.y = torch.cat(parts, dim=-1) + 0.5

    def build(self, kind: str = "svd", rank: int = 4) -> ac.AdaptedModel:
        config = ac.AdapterConfig(kind=kind, rank=rank, trainable=("shift",))
        return ac.compile_with_adapters(self.model, (self.x,), config=config)

    def train(self, adapted: ac.AdaptedModel, share: float) -> None:
        self.calls.append((adapted.active_adapter, share))
        steps = round(100 * share)
        optimizer = adapted.make_optimizer(0.03)
        scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
        for _ in range(steps):
            loss = (adapted(self.x) - self.y).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()

    @torch.no_grad()
    def evaluate(self, adapted: ac.AdaptedModel) -> Any:
        """The share of explained variance; by example in parts that average to it."""
        rest, whole = (adapted(self.x) - self.y).square().mean(1), self.y.square().mean()
        scores = 1 - rest / whole
        return scores if self.per_example else float(scores.mean())


def find(task: Task, kind: str = "svd", **options: Any) -> ac.SizeSearch:
    return ac.find_smallest(lambda: task.build(kind), task.train, task.evaluate, **{"share_of_full": 0.99} | options)


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_the_right_ranks_are_found(kind: str, tmp_path: Path) -> None:
    task = Task()
    found = find(task, kind)
    assert {adapter.site.name: adapter.rank for adapter in found.adapted.plan} == RIGHT
    assert found.recommended.triplets == 4
    assert found.recommended.score >= found.target
    each = 1 if kind == "svd" else 0
    assert found.recommended.values == 3 * (12 + 10 + each) + 12 + 8 + each
    assert [point.triplets for point in found.points] == [2, 3, 4, 8]
    assert found.points[1].score < found.target
    assert found.points[-1].share == 1
    assert float(task.evaluate(found.adapted)) == pytest.approx(found.recommended.score, abs=1e-12)
    # What is kept can be saved, and is all that is left beside the wide adapter.
    assert set(found.adapted.adapter_names) == {"default", found.adapted.active_adapter}
    found.adapted.save(tmp_path)
    again = ac.load(task.model, tmp_path)
    torch.testing.assert_close(again(task.x), found.adapted(task.x))


def test_the_spectrum_is_that_of_the_update() -> None:
    task = Task()
    found = find(task, refinements=0)
    found.adapted.use("default")
    for adapter in found.adapted.plan:
        parameters = found.adapted.adapters.parameters_of(adapter)
        delta = adapter.form.delta({name: p.detach() for name, p in parameters.items()}, adapter.scale)
        expected = torch.linalg.svdvals(delta)[: adapter.rank]
        torch.testing.assert_close(found.spectrum[adapter.site.name], expected, rtol=1e-9, atol=1e-9)
        assert int((expected > 0.1 * expected[0]).sum()) == RIGHT[adapter.site.name]


def test_each_cut_starts_from_the_wide_run_and_trains_its_share() -> None:
    task = Task()
    find(task, recovery=0.1)
    assert task.calls == [("default", 1.0), ("cut_to_4", 0.1), ("cut_to_2", 0.1), ("cut_to_3", 0.1)]


@pytest.mark.parametrize("kind", ["svd", "lora"])
def test_a_cut_without_training_is_the_best_approximation(kind: str) -> None:
    task = Task()
    adapted = task.build(kind)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.5)
        adapted.module.get_parameter("shift").fill_(0.25)
    spectrum = find_spectrum(adapted)
    wide = {a.site.name: a.form.delta(adapted.adapters.parameters_of(a), a.scale).detach() for a in adapted.plan}
    before = adapted.state_dict()
    add_cut_adapter(adapted, "cut", spectrum, {"left.weight": 2, "right.weight": 0})
    assert_same({name: adapted.state_dict()[name] for name in before}, before)
    adapted.use("cut")
    assert [(a.site.name, a.rank, a.form.name) for a in adapted.plan] == [("left.weight", 2, kind)]
    U, S, V = torch.linalg.svd(wide["left.weight"], full_matrices=False)
    expected = task.model.left.weight + (U[:, :2] * S[:2]) @ V[:2]
    module: Any = adapted.module
    torch.testing.assert_close(module.left.weight + 0, expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(module.shift, torch.full((18,), 0.25, dtype=torch.float64))
    assert count_values(adapted.plan) == sum(p.numel() for p in adapted.adapters.parameters())


def test_parts_are_ranked_by_what_they_add_for_their_size() -> None:
    """Both layers have one part of size 1; the part of the smaller layer comes first."""
    adapted = Task().build("lora", rank=1)
    with torch.no_grad():
        for adapter in adapted.plan:
            for parameter in adapted.adapters.parameters_of(adapter).values():
                parameter.zero_()
                parameter.view(-1)[0] = adapter.scale**-0.5
    assert find_spectrum(adapted).order == (("right.weight", 0), ("left.weight", 0))


def test_errors_over_examples_are_paired() -> None:
    task = Task(per_example=True)
    found = find(task, refinements=0)
    scores = {name: task_scores(task, found, name) for name in ("default", found.adapted.active_adapter)}
    kept = scores[found.adapted.active_adapter]
    assert found.recommended.error == pytest.approx(float(kept.std() / len(kept) ** 0.5))
    difference = kept - scores["default"]
    expected = float(difference.std() / len(kept) ** 0.5) / (found.full - found.base)
    assert found.recommended.share_error == pytest.approx(expected)
    assert found.points[-1].share_error == 0


def task_scores(task: Task, found: ac.SizeSearch, name: str) -> torch.Tensor:
    active = found.adapted.active_adapter
    found.adapted.use(name)
    scores: torch.Tensor = task.evaluate(found.adapted)
    found.adapted.use(active)
    return scores


def test_several_runs_give_errors() -> None:
    task = Task()
    found = find(task, runs=2, refinements=1)
    assert found.runs == 2
    assert all(point.error is not None for point in found.points)
    assert [call for call in task.calls if call[1] == 1] == [("default", 1.0)] * 2
    assert "recommended" in str(found)
    assert "2 run(s)" in str(found)
    assert found.to_dict()["ranks"] == {adapter.site.name: adapter.rank for adapter in found.adapted.plan}


def test_a_metric_in_place_of_a_share() -> None:
    low, high = (find(Task(), share_of_full=None, metric=metric) for metric in (0.5, 0.999))
    assert low.recommended.values < high.recommended.values
    assert (low.target, high.target) == (0.5, 0.999)


def test_only_the_wide_adapter_is_enough() -> None:
    task = Task()
    found = ac.find_smallest(
        lambda: task.build(rank=3), task.train, lambda adapted: float(adapted.active_adapter == "default") - 0.5
        if task.calls else -1.0, share_of_full=1, refinements=0
    )  # fmt: skip
    assert found.recommended == found.points[-1]
    assert found.adapted.active_adapter == "default"
    assert found.adapted.adapter_names == ("default",)


FAILURES: dict[str, tuple[dict[str, Any], str]] = {
    "two goals": ({"metric": 0.5}, "share_of_full=0.99, metric=0.5): expected one of them"),
    "share": ({"share_of_full": 1.5}, "share_of_full=1.5): expected a number above 0 and at most 1"),
    "recovery": ({"recovery": 0}, "recovery=0): expected a number above 0"),
    "runs": ({"runs": 0}, "runs=0): expected an integer of at least 1"),
    "too much": ({"share_of_full": None, "metric": 2.0}, "expected at least 2, which is to be enough; build a wider"),
    "a full score below the base": ({"full": -5.0}, "the full score is -5 and that before training"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_options_that_cannot_work(name: str) -> None:
    options, text = FAILURES[name]
    with pytest.raises(ConfigError, match=re.escape(text)):
        find(Task(), **options)


SCORES: dict[str, Callable[..., Any]] = {
    "nothing": lambda _: None,
    "text": lambda _: "0.9",
    "nan": lambda _: float("nan"),
    "a matrix": lambda _: torch.zeros(2, 2),
    "no example": lambda _: [],
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_that_are_none(name: str) -> None:
    task = Task()
    with pytest.raises(ConfigError, match="expected a finite number that is larger for a better model"):
        ac.find_smallest(task.build, task.train, SCORES[name])


def test_forms_that_cannot_be_cut() -> None:
    task = Task()
    with pytest.raises(ConfigError, match=r"site left.weight has the form 'dora', whose update cannot be cut"):
        ac.find_smallest(lambda: task.build("dora"), task.train, task.evaluate)


def test_build_must_return_an_adapted_model() -> None:
    task = Task()
    with pytest.raises(ConfigError, match=r"find_smallest: build\(adapted=...\) is a Two"):
        ac.find_smallest(lambda: task.model, task.train, task.evaluate)  # type: ignore[arg-type,return-value]
