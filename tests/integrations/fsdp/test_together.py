"""What all ranks do together: save, fold, export; and what a sharded model refuses to do on one rank alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh

import adapter_compiler as ac
from adapter_compiler.errors import AdapterCompilerError, ConfigError, DistributedError, SiteError
from adapter_compiler.integrations import shard
from tests.integrations.fsdp.runs import (
    STEPS,
    Block,
    assert_same_everywhere,
    draw,
    flatten,
    list_folder,
    make,
    make_optimizer,
    start,
)
from tests.ranks import RankFailedError, run_ranks

HEAD: dict[str, Any] = {"trainable": ("2.*",)}


def find_error(act: Callable[[], Any]) -> Exception:
    try:
        act()
    except AdapterCompilerError as error:
        return error
    except OSError as error:
        return error
    raise AssertionError("it did not fail")


def save_fold_and_export(folder: str) -> None:
    """After pruning and compaction, with a head that is trained fully."""
    run = start(**HEAD)
    assert run.sharded is not None
    run.train(range(STEPS))
    is_first = dist.get_rank() == 0
    assert (run.sharded.save(folder) is None) != is_first
    x = draw(99, 0)
    expected = run.adapted(x)
    loaded = ac.load(make_base(), folder)
    assert loaded.plan.adapters == run.adapted.plan.adapters
    torch.testing.assert_close(loaded(x), expected)
    merged, everywhere = run.sharded.fold(), run.sharded.fold(gather="all")
    assert (merged is None) != is_first
    assert everywhere is not None
    assert type(everywhere) is nn.Sequential
    torch.testing.assert_close(everywhere(x), expected, rtol=1e-4, atol=1e-5)
    assert run.adapted.fold_report is not None
    assert len(run.adapted.fold_report.rounding_error) == len(run.adapted.plan.live)
    path = Path(folder) / "model.onnx"
    report = run.sharded.export_onnx(path, (x,))
    assert (report is None) != is_first
    found = onnxruntime.InferenceSession(str(path)).run(None, {"input": x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), expected.detach(), rtol=1e-4, atol=1e-5)


def make_base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Sequential(Block(), Block(), Block()), nn.Linear(32, 19)).eval()


def test_all_ranks_save_fold_and_export_together(tmp_path: Path) -> None:
    run_ranks(2, save_fold_and_export, str(tmp_path))
    assert list_folder(tmp_path) == ["adapters.safetensors", "model.onnx"]


def fail_together(folder: str) -> None:
    """Rank 0 cannot write, the adapters of a rank were changed, or a rank cannot merge: all ranks say so."""
    rank = dist.get_rank()
    run = start()
    sharded = run.sharded
    assert sharded is not None
    occupied = Path(folder) / "occupied"
    if rank == 0:
        occupied.write_text("a file")
    dist.barrier()
    error = find_error(lambda: sharded.save(occupied))
    assert isinstance(error, OSError if rank == 0 else DistributedError)
    assert "occupied is a file" in str(error)
    assert isinstance(find_error(lambda: sharded.fold(gather="one")), ConfigError)
    error = find_error(lambda: sharded.export_onnx(occupied / "model.onnx", (draw(0, 0)[:, :3],)))
    assert isinstance(error, AdapterCompilerError)
    before = run.adapted.adapters.get_parameter("0.weight.P").detach().clone()
    with torch.no_grad():
        run.adapted.adapters.get_parameter("0.weight.P").add_(rank)
    acts: list[Callable[[], Any]] = [
        lambda: sharded.save(folder),
        sharded.fold,
        lambda: sharded.save_training_state(folder, run.optimizer, run.budget),
    ]
    for act in acts:
        error = find_error(act)
        assert isinstance(error, DistributedError)
        assert "0.weight.P on rank 1 is not that of rank 0" in str(error)
    with torch.no_grad():
        run.adapted.adapters.get_parameter("0.weight.P").copy_(before)
    run.train(range(STEPS))
    assert_same_everywhere(flatten(run.adapted))


def test_one_rank_that_fails_fails_all(tmp_path: Path) -> None:
    run_ranks(2, fail_together, str(tmp_path))
    assert list_folder(tmp_path) == ["occupied"]


def refuse_alone() -> None:
    adapted = make()
    shard(adapted)
    x = draw(0, 0)
    acts: dict[str, Callable[[], Any]] = {
        r"fold: 0\.weight is a DTensor over 2 ranks": adapted.fold,
        "copy_base: ": adapted.copy_base,
        "capture: ": lambda: adapted.capture(x),
        "capture_folded: ": lambda: adapted.capture_folded(x),
        "quantize_base: ": lambda: adapted.quantize_base("int8"),
        "AveragedModel": lambda: copy.deepcopy(adapted),
        "fold: ": lambda: ac.export_onnx(adapted, "model.onnx", (x,)),
        "sharded already": lambda: shard(adapted),
        "compile_with_adapters: ": lambda: ac.compile_with_adapters(adapted.module),
    }
    for text, act in acts.items():
        with pytest.raises(ConfigError, match=text):
            act()
    first: Any = adapted.module.get_submodule("0")
    for act in (lambda: first(x), lambda: first.weight.sum(), lambda: x @ first.weight.T, lambda: first.weight + 1):
        with pytest.raises(SiteError, match=r"0\.weight is a DTensor where it is used"):
            act()
    adapted(x)


def test_what_needs_whole_weights_is_refused() -> None:
    run_ranks(2, refuse_alone)


def refuse_to_shard() -> None:
    def check(text: str, act: Callable[[], Any], kind: type[Exception] = ConfigError) -> None:
        with pytest.raises(kind, match=text):
            act()

    check("on rank 1, expected", lambda: shard(make(seed=dist.get_rank())), DistributedError)
    check("expected an AdaptedModel", lambda: shard(make().module))  # type: ignore[arg-type]
    check("has 2 dimensions", lambda: shard(make(), init_device_mesh("cpu", (2, 1), mesh_dim_names=("a", "b"))))
    check("names 'odd'", lambda: shard(make(), blocks=("1.0", "odd")))
    check("ignored_params", lambda: shard(make(), ignored_params=set()))
    normed = torch.nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))
    check("is computed by a parametrization", lambda: shard(ac.compile_with_adapters(normed, (draw(0, 0),))))
    with torch.device("meta"):
        base = make_base()
    check("on the meta device", lambda: shard(ac.compile_with_adapters(base)))
    quantized = ac.compile_with_adapters(
        nn.Sequential(nn.Linear(64, 64)), (torch.ones(2, 64),), config=ac.AdapterConfig(rank=2, quantize="int8")
    )
    check("is quantized", lambda: shard(quantized))


def test_models_that_cannot_be_sharded_are_refused() -> None:
    pytest.importorskip("bitsandbytes")
    run_ranks(2, refuse_to_shard)


def test_sharding_needs_a_process_group() -> None:
    with pytest.raises(ConfigError, match="needs a process group"):
        shard(make())


def save_by_the_users_own_checkpoint(folder: str) -> None:
    """torch's own functions see names, shards and moments as of any model, also after a step."""
    adapted = make(**HEAD)
    shard(adapted)
    optimizer = make_optimizer(adapted)
    x = draw(0, dist.get_rank())
    adapted(x).square().mean().backward()
    optimizer.step()
    model, moments = get_state_dict(adapted, optimizer)
    save({"model": model, "optimizer": moments}, checkpoint_id=folder)
    other = make(**HEAD, seed=3)
    shard(other)
    theirs = make_optimizer(other)
    model, moments = get_state_dict(other, theirs)
    loaded: dict[str, Any] = {"model": model, "optimizer": moments}
    load(loaded, checkpoint_id=folder)
    set_state_dict(other, theirs, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
    torch.testing.assert_close(other(x), adapted(x), rtol=0, atol=0)
    torch.testing.assert_close(adapted.to("cpu")(x), other(x), rtol=0, atol=0)


def test_the_users_own_checkpoints_hold_everything(tmp_path: Path) -> None:
    run_ranks(2, save_by_the_users_own_checkpoint, str(tmp_path))


def wait_for_ever() -> None:
    if dist.get_rank() == 1:
        raise RuntimeError("gone")
    dist.barrier()


def test_a_rank_that_dies_ends_the_test() -> None:
    with pytest.raises(RankFailedError, match=r"gone|Connection closed"):
        run_ranks(2, wait_for_ever)
