"""Mistakes of users, and their messages: the name, what was found, what was expected, what to do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.errors import (
    AdapterCompilerError,
    BudgetError,
    CheckpointError,
    ConfigError,
    NonFiniteGradientError,
    SiteError,
)
from adapter_compiler.saving.primitives.adapter_file import FILE_NAME
from tests.adapter_compiler.config.mistakes import Mistake, Mistakes, assert_message

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.codes = nn.Parameter(torch.randint(0, 3, (3, 3)), requires_grad=False)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.embed(ids) @ self.codes.float()
        return y


def compile_net(model: Any = None, args: Any = (X,), kwargs: Any = None, **options: Any) -> ac.AdaptedModel:
    return ac.compile_with_adapters(net() if model is None else model, args, kwargs, config=ac.AdapterConfig(**options))


def schedule(**options: Any) -> ac.BudgetSchedule:
    return ac.BudgetSchedule(**{"target_rank": 8, "total_steps": 100} | options)


def budget(target_rank: float = 2, held: slice = slice(None), **kinds: Any) -> ac.RankBudget:
    adapted = ac.compile_with_adapters(net(), config=ac.AdapterConfig(rank=3))
    optimizer = torch.optim.SGD(adapted.trainable_parameters()[held], lr=0.1)
    usual: dict[str, Any] = {"adapted": adapted, "optimizer": optimizer, "schedule": schedule(target_rank=target_rank)}
    return ac.RankBudget(**usual | kinds)


def take_a_step(value: float) -> None:
    adapted = ac.compile_with_adapters(net())
    optimizer = torch.optim.SGD(adapted.trainable_parameters(), lr=0.1)
    ac.RankBudget(adapted, optimizer, schedule(target_rank=2))
    for parameter in adapted.trainable_parameters():
        parameter.grad = torch.zeros_like(parameter)
    adapted.adapters.get_parameter("2.weight.Q").grad = torch.full((3, 6), value)
    optimizer.step()


def resume() -> None:
    state = budget(schedule=schedule(target_rank=2, interval=5)).state_dict()
    budget().load_state_dict(state)


def load(folder: Path, spoil: Callable[[Path], object] = lambda path: None, **options: Any) -> None:
    ac.compile_with_adapters(net(), config=ac.AdapterConfig(rank=2)).save(folder)
    spoil(folder / FILE_NAME)
    ac.load_adapters(ac.compile_with_adapters(net(), config=ac.AdapterConfig(**{"rank": 2} | options)), folder)


def save_into_a_file(folder: Path) -> None:
    (folder / "file").touch()
    ac.compile_with_adapters(net()).save(folder / "file")


def export(folder: Path, name: str = "model.onnx", model: Any = None, args: Any = (X,)) -> None:
    ac.export_onnx(net() if model is None else model, folder / name, args)


COMPILING: Mistakes = {
    "no module": (
        lambda _: compile_net("bert-base"),
        ConfigError,
        "model | is a str | expected a torch.nn.Module | give the model itself",
    ),
    "adapters on adapters": (
        lambda _: compile_net(compile_net()),
        ConfigError,
        "model | is a AdaptedSequential | without adapters | the result of fold()",
    ),
    "arguments as a tensor": (
        lambda _: compile_net(args=X),
        ConfigError,
        "example_args | is a Tensor | expected a tuple | as in (x,)",
    ),
    "arguments by name in the wrong place": (
        lambda _: compile_net(args={"input": X}),
        ConfigError,
        "example_args | is a dict | expected a tuple | as in (x,)",
    ),
    "keywords as a list": (
        lambda _: compile_net(kwargs=[X]),
        ConfigError,
        "example_kwargs | is a list | expected a dict | as in {'x': x}",
    ),
    "options as a dict": (
        lambda _: ac.compile_with_adapters(net(), (X,), config={"rank": 3}),  # type: ignore[arg-type]
        ConfigError,
        "config | is a dict | expected options | as in AdapterConfig(",
    ),
    "sites that match nothing": (
        lambda _: compile_net(sites="*.query"),
        SiteError,
        "sites='*.query' | matches no weight | there are: 0.weight, 2.weight | correct it or leave it out",
    ),
    "exclude that matches nothing": (
        lambda _: compile_net(exclude=("0", "head")),
        SiteError,
        "exclude='head' | matches no weight | there are: 0.weight, 2.weight | correct it or leave it out",
    ),
    "trainable that matches nothing": (
        lambda _: compile_net(trainable="head"),
        SiteError,
        "trainable='head' | matches no parameter | there are: 0.weight, 0.bias | correct it or leave it out",
    ),
    "everything excluded": (
        lambda _: compile_net(exclude="*"),
        SiteError,
        "0.weight: excluded (exclude='*') | no weight to adapt | "
        "expected at least one | change sites, exclude or trainable",
    ),
    "nothing to adapt": (
        lambda _: compile_net(nn.ReLU()),
        SiteError,
        "ReLU | no weights of two or more dimensions | expected at least one | change sites, exclude or trainable",
    ),
    "no linear layers": (
        lambda _: compile_net(Words(), (torch.tensor([1]),), exclude="codes"),
        SiteError,
        "embed.weight | used by embedding | expected at least one | name it in sites to adapt it",
    ),
    "a weight of integers": (
        lambda _: compile_net(Words(), (torch.tensor([1]),), sites="codes"),
        SiteError,
        "codes | dtype torch.int64 | expected at least one | change sites",
    ),
    "parameters without shape": (
        lambda _: compile_net(nn.Sequential(nn.LazyLinear(3))),
        AdapterCompilerError,
        "parameter 0.weight | is lazy and has no shape yet | expected a tensor | call the model once on an example",
    ),
    "parameters without shape, in place": (
        lambda _: compile_net(nn.Sequential(nn.LazyLinear(3)), (), inplace=True),
        AdapterCompilerError,
        "parameter 0.weight | is lazy and has no shape yet | expected a tensor | call the model once on an example",
    ),
    "folding without values": (
        lambda _: compile_net(net().to("meta"), ()).fold(),
        SiteError,
        "site 0.weight | is on the meta device | "
        "expected a weight and an adapter with values | load them before folding",
    ),
}


def refusal(do: Callable[[Path], object], tensors: str, found: str) -> Mistake:
    """The model itself does not run on the arguments."""
    name = f"Sequential itself refuses the call with {tensors}"
    parts = (name, found, "expected arguments that the model runs on", "try them on the model without adapters")
    return do, AdapterCompilerError, " | ".join(parts)


GIVEN = "args[0]: torch.float32 (2, 4)"
WIDE = torch.randn(2, 5)

CALLS: Mistakes = {
    "example of a wrong width": refusal(
        lambda _: compile_net(args=(WIDE,)), "args[0]: torch.float32 (2, 5)", "2x5 and 4x6"
    ),
    "example of a wrong dtype": refusal(lambda _: compile_net(net().half()), GIVEN, "Float and Half"),
    "example on a wrong device": refusal(lambda _: compile_net(args=(X.to("meta"),)), GIVEN, "meta"),
    "example with too much": refusal(lambda _: compile_net(args=(X, X)), GIVEN, "takes 2 positional arguments but 3"),
    "example under a wrong name": refusal(
        lambda _: compile_net(args=(), kwargs={"inputs": X}), "inputs", "unexpected keyword argument 'inputs'"
    ),
    "export of a wrong width": refusal(
        lambda folder: export(folder, args=(WIDE,)), "input: torch.float32 (2, 5)", "2x5 and 4x6"
    ),
}

TRAINING: Mistakes = {
    "a plain module": (
        lambda _: budget(adapted=net()),
        BudgetError,
        "adapted | is a Sequential | expected AdaptedModel | what compile_with_adapters returned",
    ),
    "parameters for an optimizer": (
        lambda _: budget(optimizer=[]),
        BudgetError,
        "optimizer | is an empty list | expected Optimizer | adapted.trainable_parameters()",
    ),
    "options for a schedule": (
        lambda _: budget(schedule={"target_rank": 2}),
        BudgetError,
        "schedule | is a dict | expected BudgetSchedule | give BudgetSchedule(",
    ),
    "an optimizer without the adapters": (
        lambda _: budget(held=slice(3)),
        BudgetError,
        "first: 2.weight | does not hold the adapters of 1 of 2 sites | "
        "expected all of them | adapted.trainable_parameters()",
    ),
    "target above the rank": (
        lambda _: budget(target_rank=9),
        BudgetError,
        "target_rank=9 | exceeds the rank 3 | expected at most 3 | compile with AdapterConfig(rank=",
    ),
    "target of no triplet": (
        lambda _: budget(target_rank=0.1),
        BudgetError,
        "target_rank=0.1 | leaves no triplet | expected at least 0.5 | raise it",
    ),
    "gradient of nan": (
        lambda _: take_a_step(float("nan")),
        NonFiniteGradientError,
        "site 2.weight: the gradient of Q | has inf or nan at step 1 | "
        "expected finite values | Lower the learning rate",
    ),
    "the state of another schedule": (
        lambda _: resume(),
        CheckpointError,
        "budget state | interval=5 | this budget has interval=10 | resume with the same BudgetSchedule",
    ),
}

FILES: Mistakes = {
    "no such folder": (
        lambda folder: ac.load_adapters(compile_net(), folder / "nowhere"),
        CheckpointError,
        "nowhere/adapters.safetensors | does not exist | "
        "expected a folder that AdaptedModel.save wrote | save there first",
    ),
    "half a file": (
        lambda folder: load(folder, lambda path: path.write_bytes(path.read_bytes()[:200])),
        CheckpointError,
        "adapters.safetensors | cannot be read as a safetensors file | expected 2 to 192 | save it again",
    ),
    "adapters of another rank": (
        lambda folder: load(folder, rank=1, alpha=8),
        CheckpointError,
        "site 0.weight | was saved with rank=2 | this model has rank=1 | compile with the rank and alpha",
    ),
    "loading into a plain module": (
        lambda folder: ac.load_adapters(net(), folder),  # type: ignore[arg-type]
        CheckpointError,
        "adapted | is a Sequential | expected an AdaptedModel | what compile_with_adapters returned",
    ),
    "saving without values": (
        lambda folder: compile_net(net().to("meta"), ()).save(folder),
        CheckpointError,
        "adapters.0.weight | is on the meta device | expected a tensor with values | load them first",
    ),
    "saving into a file": (
        save_into_a_file,
        OSError,
        "/file | is a file | expected a folder | give another one",
    ),
    "exporting no module": (
        lambda folder: export(folder, model="m"),
        ConfigError,
        "adapted_or_model | is a str | expected an AdaptedModel or a torch.nn.Module | give the model itself",
    ),
    "exporting without a call": (
        lambda folder: export(folder, args=()),
        ConfigError,
        "example_args and example_kwargs | are empty | "
        "expected the arguments of one call | give example_args or example_kwargs",
    ),
    "exporting on a tensor": (
        lambda folder: export(folder, args=X),
        ConfigError,
        "example_args | is a Tensor | expected a tuple | as in (x,)",
    ),
    "exporting to a folder": (
        lambda folder: export(folder, name=""),
        OSError,
        "test_ | is a folder | expected the name of a file | add one",
    ),
}


@pytest.mark.parametrize("case", COMPILING)
def test_compiling(case: str, tmp_path: Path) -> None:
    assert_message(COMPILING[case], tmp_path)


@pytest.mark.parametrize("case", CALLS)
def test_calling(case: str, tmp_path: Path) -> None:
    assert_message(CALLS[case], tmp_path)


@pytest.mark.parametrize("case", TRAINING)
def test_training(case: str, tmp_path: Path) -> None:
    assert_message(TRAINING[case], tmp_path)


@pytest.mark.parametrize("case", FILES)
def test_reading_and_writing(case: str, tmp_path: Path) -> None:
    assert_message(FILES[case], tmp_path)


def test_frozen_parameters_are_no_mistake() -> None:
    adapted = compile_net(net().requires_grad_(False))
    adapted(X).sum().backward()
    assert all(p.grad is not None for p in adapted.trainable_parameters())
    assert not any(p.requires_grad for p in adapted.fold().parameters())


def test_a_model_without_values_can_be_planned() -> None:
    adapted = compile_net(net().to("meta"), (X.to("meta"),))
    assert [site.name for site in adapted.sites] == ["0.weight", "2.weight"]
    assert adapted.report().trainable_parameters == 4 * 10 + 4 + 3 * 9 + 3
