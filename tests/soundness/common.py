"""Situations in which an adapted model must do what eager PyTorch does; :mod:`.oracle` compares one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

import adapter_compiler as ac

WIDTH = 8

#: The number of random models; above the default, all other situations are tried in full too (for a nightly run).
EXAMPLES = int(os.environ.get("ADAPTER_COMPILER_EXAMPLES", "300"))
IS_NIGHT = EXAMPLES > 300

Context = Callable[[], contextlib.AbstractContextManager[Any]]


def draw() -> tuple[Any, ...]:
    """A batch for :class:`Net`."""
    return (torch.randn(3, WIDTH),)


def draw_more() -> tuple[Any, ...]:
    """A batch of another size, shifted so that branches on its values go the other way."""
    return (torch.randn(5, WIDTH) * 2 - 0.5,)


def nothing(model: Any) -> None:
    pass


def plain_call(model: Any, *args: Any) -> Any:
    return model(*args)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The options of one trial of a situation.

    Attributes:
        name: the name of the run.
        training: the training mode of the model.
        has_example: whether compiling gets an example; without one, sites are found by the classes of modules.
        capture: whether the example is recorded, which takes longer than everything else here, or watched.
        is_checkpointed: whether activations are recomputed in backward.
        is_large: whether code for large activations also runs for the small ones of these tests.
        is_thorough: whether the situation itself is checked too: the adapters and the change must have an effect.
    """

    name: str
    training: bool
    has_example: bool = True
    capture: str = "off"
    is_checkpointed: bool = False
    is_large: bool = False
    is_thorough: bool = True

    @property
    def options(self) -> dict[str, Any]:
        """The options of the configuration."""
        return {"capture": self.capture, "checkpoint": self.is_checkpointed}


RECORDED = Run(name="recorded", training=False, capture="auto")
EVAL = Run(name="eval", training=False)
TRAIN = Run(name="train", training=True, has_example=False)
WATCHED = Run(name="watched", training=True)
CHECKPOINT = Run(name="checkpoint", training=True, is_checkpointed=True, is_thorough=False)
LARGE = Run(name="large", training=True, is_large=True, is_thorough=False)

ALL = (EVAL, TRAIN, CHECKPOINT, LARGE)
#: For models without linear layers, whose sites can only be found with an example.
WITH_EXAMPLE = (EVAL, WATCHED, CHECKPOINT, LARGE)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Situation:
    """Something that a user's model or its user may do.

    Attributes:
        name: a short description.
        build: makes the user's model.
        args: draws the arguments of a call, and of the example.
        keywords: draws the keyword arguments of the example.
        call: calls a model: the adapted one or the oracle.
        change: what happens to the model between two calls.
        later: draws the arguments after the change.
        around: a context for the first call.
        later_around: one for the call after the change, by default the same.
        rebased: whether the change gives W new values, to which ΔW is then added.
        runs: the trials.
        options: options of the configuration.
        raises: whether eager code raises in one of the calls.
        differs: whether the adapters change the result of a call.
        shows_in: the training modes in which the change has an effect; none if there is no change.
        has_gradients: whether gradients are compared.
        is_folded: whether the folded model is compared too.
        tolerance: relative and absolute.
        is_limit: whether docs/how_it_runs.md lists it under "What it cannot see".
    """

    name: str
    build: Callable[[], nn.Module]
    args: Callable[[], Sequence[Any]] = draw
    keywords: Callable[[], dict[str, Any]] = dict
    call: Callable[..., Any] = plain_call
    change: Callable[[Any], object] = nothing
    later: Callable[[], Sequence[Any]] | None = None
    around: Context = contextlib.nullcontext
    later_around: Context | None = None
    rebased: bool = False
    runs: Sequence[Run] = ALL
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    raises: bool = False
    differs: bool = True
    shows_in: Sequence[str] = ("eval", "train")
    has_gradients: bool = True
    is_folded: bool = True
    tolerance: tuple[float, float] = (1e-4, 1e-5)
    is_limit: bool = False

    def shows(self, run: Run) -> bool:
        """Whether the result of the oracle must differ after the change."""
        is_changed = self.change is not nothing or self.later_around is not None
        return is_changed and ("train" if run.training else "eval") in self.shows_in


class Net(nn.Module):
    """A model with parts of many kinds, and a function that computes something with some of them."""

    def __init__(self, run: Callable[..., Any]) -> None:
        super().__init__()
        self.run = run
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.norm, self.batch = nn.LayerNorm(WIDTH), nn.BatchNorm1d(WIDTH)
        self.drop = nn.Dropout(0.5)
        self.raw = nn.Parameter(torch.randn(WIDTH, WIDTH) / WIDTH**0.5)
        self.register_buffer("shift", torch.linspace(-1, 1, WIDTH))
        self.flag, self.scale, self.table = True, 1.0, {"scale": 1.0}
        self.plain = torch.full((WIDTH,), 0.5)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def make(run: Callable[..., Any]) -> Callable[[], nn.Module]:
    """Builds a :class:`Net` that computes this."""
    return lambda: Net(run)


def put(path: str, value: Any) -> Callable[[Any], None]:
    """A change that assigns to an attribute; a function as value is called to make a value for each model."""

    def change(net: Any) -> None:
        owner, _, name = path.rpartition(".")
        seed(21)
        setattr(net.get_submodule(owner), name, value() if callable(value) else value)

    return change


def params(table: Sequence[Situation]) -> list[Any]:
    """Each situation of a table with its runs, for ``pytest.mark.parametrize``; slow runs alternate by default."""
    names = [situation.name for situation in table]
    assert len(names) == len(set(names))
    pairs = [(one, run) for index, one in enumerate(table) for run in _choose_runs(one.runs, index)]
    limit = pytest.mark.xfail(reason="a documented limit: docs/how_it_runs.md", strict=True)
    return [
        pytest.param(one, run, id=f"{one.name}-{run.name}", marks=limit if one.is_limit else []) for one, run in pairs
    ]


def _choose_runs(runs: Sequence[Run], index: int) -> list[Run]:
    if IS_NIGHT:
        return [*runs, *([RECORDED] if EVAL in runs else [])]
    skipped = ((CHECKPOINT,), (LARGE,), (CHECKPOINT, LARGE), (CHECKPOINT, LARGE))[index % 4]
    chosen = [run for run in runs if run not in skipped or len(runs) < len(ALL)]
    return [RECORDED if run is EVAL and index % 6 == 0 else run for run in chosen]


def seed(number: int) -> None:
    torch.default_generator.manual_seed(
        number
    )  # torch.manual_seed also asks every accelerator, which takes longer than a test
    random.seed(number)


def adapt(
    model: nn.Module,
    args: Sequence[Any] = (),
    kwargs: dict[str, Any] | None = None,
    *,
    std: float = 0.5,
    **options: Any,
) -> ac.AdaptedModel:
    """The adapted model, with adapters that change every weight significantly."""
    options = {"rank": 2, "alpha": 2, "sites": "*", **options}
    adapted = ac.compile_with_adapters(model, tuple(args), kwargs, config=ac.AdapterConfig(**options))
    randomize(adapted, std)
    return adapted


@torch.no_grad()
def randomize(adapted: ac.AdaptedModel, std: float = 0.5) -> None:
    generator = torch.Generator().manual_seed(11)
    for parameter in adapted.adapters.parameters():
        noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.copy_(parameter + noise * std)


def treat_all_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("passes.fuse.memory_efficient_ops._SMALL", 0)
    monkeypatch.setattr("passes.fuse.fused_ops._SMALL", 0)
    monkeypatch.setattr("passes.fuse.fused_ops._FEW_ROWS", 0)
    monkeypatch.setattr("adapter_compiler.model.dispatch.memory._LARGE", 0)


@contextlib.contextmanager
def setting(target: dict[str, Any], key: str, value: Any) -> Iterator[None]:
    """A context in which a global has another value."""
    before = target[key]
    target[key] = value
    try:
        yield
    finally:
        target[key] = before
