"""A run that is saved through torch.distributed.checkpoint goes on bit for bit, on other ranks as in one process."""

from __future__ import annotations

import dataclasses
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

import adapter_compiler as ac
from adapter_compiler.errors import CheckpointError, DistributedError
from adapter_compiler.integrations import load_sharded_state
from adapter_compiler.integrations.fsdp import shard
from adapter_compiler.integrations.fsdp.state.base_checksums import describe_sharded_base
from adapter_compiler.integrations.fsdp.state.reader import METADATA, TensorReader
from adapter_compiler.training.resuming.base_weights import describe_base
from tests.integrations.fsdp.runs import (
    STEPS,
    Run,
    assert_like,
    flatten,
    flatten_all,
    list_folder,
    make,
    make_budget,
    make_optimizer,
    run_alone,
    start,
)
from tests.ranks import run_ranks

#: With a head that is trained fully, so that weights and moments are sharded too.
HEAD = {"trainable": ("2.bias", "2.weight"), "dropout": True}


@dataclasses.dataclass
class Everything:
    """All numbers of a run that a file must hold."""

    values: list[torch.Tensor]
    moments: list[torch.Tensor]
    history: Any
    statistics: Any
    ranks: dict[str, int]


def gather(run: Run) -> Everything:
    """All numbers of a run, whole."""
    trained = [p for p in run.adapted.module.parameters() if p.requires_grad]
    moments = [
        run.optimizer.state[p][key]
        for p in run.adapted.trainable_parameters()
        for key in ("exp_avg", "exp_avg_sq", "step")
    ]
    whole = [t.full_tensor() if hasattr(t, "full_tensor") else t for t in (*trained, *moments)]
    return Everything(
        values=[
            *(p.detach().clone() for p in run.adapted.adapters.parameters()),
            *(p.detach().clone() for p in whole[: len(trained)]),
        ],
        moments=[m.clone() for m in whole[len(trained) :]],
        history=[dataclasses.asdict(record) for record in run.budget.history],
        statistics=run.budget.state_dict()["sites"],
        ranks={adapter.site.name: adapter.rank for adapter in run.adapted.plan},
    )


def assert_equal(found: Any, expected: Any) -> None:
    """Equal in every bit."""
    torch.testing.assert_close(vars(found), vars(expected), rtol=0, atol=0)


def save(folder: str, stop: int, options: dict[str, Any]) -> tuple[Everything, Everything]:
    """Train, save after ``stop`` steps, and train on; what it was then and at the end."""
    run = start(**options)
    assert run.sharded is not None
    torch.manual_seed(10 + dist.get_rank())
    random.seed(10 + dist.get_rank())
    run.train(range(stop))
    run.sharded.save_training_state(folder, run.optimizer, run.budget)
    before = gather(run)
    run.train(range(stop, STEPS))
    return before, gather(run)


def resume(folder: str, stop: int, options: dict[str, Any]) -> tuple[Everything, Everything]:
    run = start(**options)
    assert run.sharded is not None
    run.sharded.load_training_state(folder, run.optimizer, run.budget)
    before = gather(run)
    run.train(range(stop, STEPS))
    return before, gather(run)


@pytest.mark.parametrize("stop", [3, 7], ids=["while pruning", "after compaction"])
def test_a_run_goes_on_bit_for_bit_on_as_many_ranks(tmp_path: Path, stop: int) -> None:
    saved = run_ranks(2, save, str(tmp_path), stop, HEAD)
    resumed = run_ranks(2, resume, str(tmp_path), stop, HEAD)
    for (before, after), (found, last) in zip(saved, resumed, strict=True):
        assert_equal(found, before)
        assert_equal(last, after)
    if stop == 7:
        assert sum(saved[0][0].ranks.values()) == 2 * len(saved[0][0].ranks)


@pytest.mark.parametrize("ranks", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_another_number_of_ranks_loads_the_same_state(tmp_path: Path, ranks: int) -> None:
    before, _ = run_ranks(2, save, str(tmp_path), 7, HEAD)[0]
    for found, _ in run_ranks(ranks, resume, str(tmp_path), 7, HEAD):
        assert_equal(found, before)


@pytest.mark.slow
def test_two_ranks_load_the_state_of_four(tmp_path: Path) -> None:
    before, _ = run_ranks(4, save, str(tmp_path), 3, HEAD)[0]
    for found, _ in run_ranks(2, resume, str(tmp_path), 3, HEAD):
        assert_equal(found, before)


def test_one_process_without_a_group_resumes_what_two_ranks_saved(tmp_path: Path) -> None:
    """And trains on like a run that was in one process from the start."""
    before, _ = run_ranks(2, save, str(tmp_path), 6, {"trainable": ("2.bias", "2.weight")})[0]
    run = start(is_sharded=False, trainable=("2.bias", "2.weight"))
    load_sharded_state(tmp_path, run.adapted, run.optimizer, run.budget)
    assert_equal(gather(run), before)
    run.train(range(6, STEPS), range(2))
    expected = run_alone(2, trainable=("2.bias", "2.weight"))
    assert_like(run, expected)


def save_twice(folder: str) -> list[list[str]]:
    run = start()
    assert run.sharded is not None
    found = []
    for step in range(2):
        run.train([step])
        run.sharded.save_training_state(folder, run.optimizer, run.budget)
        dist.barrier()
        found.append(list_folder(folder))
        dist.barrier()
    return found


def test_a_later_save_replaces_the_earlier_one(tmp_path: Path) -> None:
    first, second = run_ranks(2, save_twice, str(tmp_path))[0]
    assert [name.split("-")[0] for name in first] == ["data", "sharded_state.safetensors"]
    assert len(second) == 2
    assert second[0] != first[0]


def accumulate(folder: str) -> None:
    """Save in the midst of an accumulation, at which each rank has gradients of its own."""
    from tests.integrations.fsdp.runs import draw, measure_loss

    run = start()
    assert run.sharded is not None
    measure_loss(run.adapted, draw(0, dist.get_rank())).backward()
    run.sharded.save_training_state(folder, run.optimizer, run.budget)


def resume_accumulated(folder: str) -> torch.Tensor:
    run = start()
    assert run.sharded is not None
    run.sharded.load_training_state(folder, run.optimizer, run.budget)
    run.sharded.sync_gradients()
    return torch.cat([p.grad.flatten() for p in run.adapted.adapters.parameters() if p.grad is not None])


@pytest.mark.parametrize("ranks", [2, 1])
def test_accumulated_gradients_are_saved_by_rank(tmp_path: Path, ranks: int) -> None:
    from tests.integrations.fsdp.runs import draw, measure_loss

    run_ranks(2, accumulate, str(tmp_path))
    expected = make()
    measure_loss(expected, torch.cat([draw(0, 0), draw(0, 1)])).backward()
    wanted = torch.cat([p.grad.flatten() for p in expected.adapters.parameters() if p.grad is not None])
    for found in run_ranks(ranks, resume_accumulated, str(tmp_path)):
        torch.testing.assert_close(found, wanted)


def start_with_two_adapters(*, is_sharded: bool = True) -> Run:
    """With a head that is trained fully, of which each adapter has values of its own; the second adapter trains."""
    adapted = make(trainable=("2.*",))
    adapted.add_adapter("second", config=ac.AdapterConfig(rank=3))
    sharded = shard(adapted) if is_sharded else None
    adapted.use("second")
    optimizer = make_optimizer(adapted)
    return Run(adapted, optimizer, make_budget(adapted, optimizer, target=1), sharded)


def save_two_adapters(folder: str) -> torch.Tensor:
    run = start_with_two_adapters()
    assert run.sharded is not None
    with torch.no_grad():
        for parameter in run.adapted.parameters_of_adapter("default").parameters():
            parameter.add_(0.5)
    run.train(range(3))
    run.sharded.save_training_state(folder, run.optimizer, run.budget)
    return flatten_all(run.adapted)


def load_two_adapters(folder: str) -> torch.Tensor:
    run = start_with_two_adapters()
    assert run.sharded is not None
    run.sharded.load_training_state(folder, run.optimizer, run.budget)
    return flatten_all(run.adapted)


def test_inactive_adapters_are_saved_and_loaded(tmp_path: Path) -> None:
    saved = run_ranks(2, save_two_adapters, str(tmp_path))[0]
    for found in run_ranks(2, load_two_adapters, str(tmp_path)):
        assert torch.equal(found, saved)
    run = start_with_two_adapters(is_sharded=False)
    assert not torch.equal(flatten_all(run.adapted), saved)
    load_sharded_state(tmp_path, run.adapted, run.optimizer, run.budget)
    assert torch.equal(flatten_all(run.adapted), saved)


def draw_after(folder: str) -> float:
    run = start()
    assert run.sharded is not None
    run.sharded.load_training_state(folder, run.optimizer, run.budget)
    return float(torch.rand(()))


@pytest.mark.slow
def test_further_ranks_draw_other_numbers(tmp_path: Path) -> None:
    run_ranks(2, save, str(tmp_path), 3, {})
    drawn = run_ranks(4, draw_after, str(tmp_path))
    assert len(set(drawn)) == 4
    assert run_ranks(4, draw_after, str(tmp_path)) == drawn


def refuse(folder: str, options: dict[str, Any]) -> tuple[str, bool]:
    run = start(**options)
    assert run.sharded is not None
    before = flatten(run.adapted).clone()
    try:
        run.sharded.load_training_state(folder, run.optimizer, run.budget)
    except CheckpointError as error:
        return str(error), torch.equal(flatten(run.adapted), before)
    raise AssertionError("it was loaded")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 5}, "frozen weights of this model are not those of the run that was saved"),
        ({"rank": 3}, "was saved with"),
        ({"exclude": ("0.*",)}, "sites differ"),
    ],
    ids=["another base", "another rank", "other sites"],
)
def test_what_does_not_fit_is_refused_on_all_ranks(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    run_ranks(2, save, str(tmp_path), 3, {})
    for text, is_unchanged in run_ranks(2, refuse, str(tmp_path), options):
        assert message in text
        assert is_unchanged


def refuse_missing(folder: str) -> str:
    run = start()
    assert run.sharded is not None
    try:
        run.sharded.load_training_state(folder, run.optimizer, run.budget)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it was loaded")


def test_damaged_folders_are_refused_on_all_ranks(tmp_path: Path) -> None:
    for text in run_ranks(2, refuse_missing, str(tmp_path)):
        assert "sharded_state.safetensors does not exist" in text
    run_ranks(2, save, str(tmp_path), 3, {})
    data = next(tmp_path.glob("data-*"))
    for file in data.glob("__1_*"):
        file.unlink()
    for text in run_ranks(2, refuse_missing, str(tmp_path)):
        assert "not all ranks could read" in text


class FailsOn:
    """An object whose state one rank cannot take or give."""

    def __init__(self, rank: int, method: str) -> None:
        self.rank, self.method = rank, method

    def state_dict(self) -> dict[str, Any]:
        if self.method == "save" and dist.get_rank() == self.rank:
            return {"odd": object()}
        return {"even": 1}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.method == "load" and dist.get_rank() == self.rank:
            raise RuntimeError("no room")


def fail(folder: str, rank: int, method: str) -> tuple[str, str, bool, list[str]]:
    run = start()
    assert run.sharded is not None
    other = FailsOn(rank, "")
    run.train(range(2))
    run.sharded.save_training_state(folder, run.optimizer, run.budget, other=other)
    run.train(range(2, 3))
    before = flatten(run.adapted).clone()
    other.method = method
    act: Any = run.sharded.save_training_state if method == "save" else run.sharded.load_training_state
    try:
        act(folder, run.optimizer, run.budget, other=other)
    except (CheckpointError, DistributedError) as error:
        dist.barrier()
        return type(error).__name__, str(error), torch.equal(flatten(run.adapted), before), list_folder(folder)
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("method", "reason"), [("save", "cannot be saved without pickle"), ("load", "no room")])
def test_one_rank_that_fails_fails_all_and_changes_nothing(tmp_path: Path, rank: int, method: str, reason: str) -> None:
    results = run_ranks(2, fail, str(tmp_path), rank, method)
    for number, (name, text, is_unchanged, left) in enumerate(results):
        assert name == "CheckpointError"
        assert reason in text
        assert text.startswith(f"rank {rank}: ") == (number != rank)
        assert is_unchanged
        assert len(left) == 2


def describe(options: dict[str, Any]) -> tuple[dict[str, str], dict[str, str]]:
    adapted = make(**options).to(torch.bfloat16)
    whole = describe_base(adapted)
    from adapter_compiler.integrations import shard

    sharded = shard(adapted)
    return whole, describe_sharded_base(adapted, sharded.mesh.get_group())


@pytest.mark.parametrize("ranks", [2, 3])
def test_checksums_of_shards_are_those_of_whole_weights(ranks: int) -> None:
    """In bfloat16, where 19 outputs make shards that begin within a word."""
    for whole, sharded in run_ranks(ranks, describe, {}):
        assert len(whole) == 16
        assert sharded == whole


def save_locally(folder: str) -> str:
    run = start(trainable=("2.bias",))
    try:
        ac.save_training_state(folder, run.adapted, run.optimizer, run.budget)
    except CheckpointError as error:
        return str(error)
    raise AssertionError("it was saved")


def test_one_rank_alone_does_not_save_what_it_has_a_part_of(tmp_path: Path) -> None:
    assert "2.bias is trained fully and is a DTensor" in run_ranks(2, save_locally, str(tmp_path))[0]


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("was_run"),)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (RunsCode(), "which is no part of the metadata of tensors"),
        (Metadata(state_dict_metadata={"a": BytesStorageMetadata()}), "expected|which is no part"),
        (torch.float32, "is a NoneType, expected tensors only"),
        (None, "cannot be read"),
    ],
    ids=["code", "a pickled object", "something else", "damaged"],
)
def test_metadata_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / METADATA).write_bytes(pickle.dumps(value)[: 3 if value is None else None])
    with pytest.raises(CheckpointError, match=message):
        TensorReader(tmp_path).read_metadata()
    assert list_folder(tmp_path) == [METADATA]
