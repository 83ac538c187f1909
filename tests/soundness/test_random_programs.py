"""Small random models, changed at random between calls, against eager PyTorch.

``ADAPTER_COMPILER_EXAMPLES`` is the number of models; a nightly run has 5000.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.soundness.common import EXAMPLES, Context, Situation, adapt, seed, treat_all_as_large
from tests.soundness.oracle import Oracle, compare, find_difference, observe
from tests.soundness.random_models import CHANGES, GLOBALS, STEPS, WIDTH, Model

AROUND: dict[str, Context] = {
    "nothing": contextlib.nullcontext,
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "enable_grad": torch.enable_grad,
    # Without the cache, in which a weight that a step writes into keeps its former values until autocast ends.
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
}
#: Steps whose result changes discontinuously, or strongly, with the rounding of half precision.
DELICATE = (
    "value", "break", "index", "sorted", "item", "weight-item", "lookup", "norm", "batch-norm", "force",
    "gradient-of-copy", "backward-inside", "write-row",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Call:
    """One call, and the change of the model before it."""

    changes: tuple[tuple[str, int], ...]
    training: bool | None
    around: str
    batch: int
    requires_grad: bool
    is_folded: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """A model, the options of its adapters, and the calls."""

    steps: tuple[tuple[str, int, int], ...]
    tied: bool
    training: bool
    has_example: bool
    options: tuple[tuple[str, Any], ...]
    is_large: bool
    is_double: bool
    calls: tuple[Call, ...]


def calls(changes: st.SearchStrategy[tuple[tuple[str, int], ...]]) -> st.SearchStrategy[Call]:
    return st.builds(
        Call,
        changes=changes,
        training=st.sampled_from([None, None, True, False]),
        around=st.sampled_from(["nothing", "nothing", "nothing", *AROUND]),
        batch=st.integers(1, 5),
        requires_grad=st.booleans(),
        is_folded=st.sampled_from([False, False, True]),
    )


PROGRAMS = st.builds(
    Program,
    steps=st.lists(
        st.tuples(st.sampled_from(sorted(STEPS)), st.integers(0, 2), st.integers(0, 9)), min_size=2, max_size=7
    ).map(tuple),
    tied=st.booleans(),
    training=st.booleans(),
    has_example=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "capture": st.sampled_from(["off", "off", "off", "off", "auto"]),
            "kind": st.sampled_from(["svd", "svd", "lora", "dora"]),
            "checkpoint": st.sampled_from([False, False, True]),
            "fused": st.sampled_from([True, True, False]),
        }
    ).map(lambda options: tuple(options.items())),
    is_large=st.booleans(),
    is_double=st.booleans(),
    calls=st.tuples(
        calls(st.just(())),
        calls(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 9)), max_size=3).map(tuple)),
        calls(st.lists(st.tuples(st.sampled_from(sorted(CHANGES)), st.integers(0, 9)), max_size=2).map(tuple)),
    ),
)


def run(program: Program, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Compare every call; returns whether the adapters had an effect in one of them."""
    if program.is_large:
        treat_all_as_large(monkeypatch)
    monkeypatch.setitem(GLOBALS, "scale", 1.0)
    dtype = torch.float64 if program.is_double else torch.float32
    seed(1)
    # The last layer ensures that there is a weight to adapt.
    model: nn.Module = Model((*program.steps, ("linear", 0, 0)), tied=program.tied).to(dtype).train(program.training)
    base = copy.deepcopy(model)
    example = (torch.randn(3, WIDTH, dtype=dtype),) if program.has_example else ()
    options = dict(program.options)
    if any(name.startswith("rescale") for name, _, _ in program.steps):
        options["kind"] = "svd"
    regions = ("layers.*",) if options["checkpoint"] else ()
    adapted = adapt(model, example, regions=regions, **options)
    oracle = Oracle(adapted, base)
    effects = [run_call(program, call, adapted, oracle, base, 10 * i) for i, call in enumerate(program.calls)]
    return max(effects) > 1e-2


def run_call(program: Program, call: Call, adapted: Any, oracle: Oracle, base: nn.Module, number: int) -> float:
    for name, way in call.changes:
        if name.startswith("write") and "dora" in dict(program.options).values():
            continue  # no W gives the result, so the write is refused

        def change(model: Any, name: str = name, way: int = way) -> None:
            seed(number)
            CHANGES[name](model, way)

        change(adapted.module)
        oracle.apply(change, rebased=name.startswith("fresh"))
        change(base)
    if call.training is not None:
        for model in (adapted, oracle.model, base):
            model.train(call.training)
    is_rough = call.around == "autocast" and not program.is_double
    if is_rough and any(name.startswith(DELICATE) for name, _, _ in program.steps):
        return 0.0
    dtype = torch.float64 if program.is_double else torch.float32

    def draw() -> tuple[Any, ...]:
        return (torch.randn(call.batch, WIDTH, dtype=dtype).requires_grad_(call.requires_grad),)

    tolerance = (6e-2, 6e-2) if is_rough else (1e-8, 1e-9) if program.is_double else (1e-3, 1e-4)
    # A model may refuse a call, such as a write into an input that requires grad; both models must refuse it.
    situation = Situation(name="random", build=nn.Module, raises=True, tolerance=tolerance)
    around = AROUND[call.around]
    # A folded model has the requires_grad flags of the user's model, and the oracle does not. They decide what a model
    # reads, and which weights autograd keeps, so that a write after their use is an error.
    of_flags = ("requires-grad", "rescale", "rescale-views")
    is_folded = call.is_folded and all(name not in of_flags for name, _, _ in program.steps)
    expected = compare(situation, adapted, oracle, draw, around, number, is_folded=is_folded)
    return find_difference(expected, observe(situation, base, draw, around, number))


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_random_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: Counter[bool] = Counter()

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(program=PROGRAMS)
    def run_one(program: Program) -> None:
        with monkeypatch.context() as patches:
            shown[run(program, patches)] += 1

    run_one()
    assert shown[True] > 4 * shown[False], "the adapters must have an effect in most models"
