"""b(t) against the formula, and the steps at which it is enforced."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError


@st.composite
def schedules(draw: st.DrawFn) -> ac.BudgetSchedule:
    semantics = draw(st.sampled_from(["paper", "peft"]))
    warmup = draw(st.integers(0, 20))
    final = draw(st.integers(0 if semantics == "paper" else 1, 20))
    return ac.BudgetSchedule(
        target_rank=draw(st.sampled_from([0.5, 1, 2, 3.75])),
        total_steps=warmup + final + draw(st.integers(1, 40)),
        warmup_steps=warmup,
        final_steps=final,
        interval=draw(st.integers(1, 12)),
        semantics=semantics,
    )


SIZES = st.tuples(st.integers(1, 500), st.integers(1, 500)).map(sorted)


@given(schedule=schedules(), sizes=SIZES)
def test_cubic_from_all_triplets_to_the_target(schedule: ac.BudgetSchedule, sizes: list[int]) -> None:
    target, initial = sizes
    end = schedule.total_steps - schedule.final
    budgets = [schedule.budget(step, initial, target) for step in range(schedule.total_steps + 5)]
    for step, found in enumerate(budgets):
        if step < schedule.warmup:
            assert found == initial
        elif step >= end:
            assert found == target
        else:
            remaining = 1 - Fraction(step - schedule.warmup, end - schedule.warmup)
            exact = target + (initial - target) * remaining**3
            assert exact - 1 - Fraction(1, 10**6) < found <= exact + Fraction(1, 10**6)
    assert budgets[schedule.warmup] == initial
    assert budgets[end] == target
    assert budgets == sorted(budgets, reverse=True)


@given(schedule=schedules())
def test_maskings_are_between_warm_up_and_the_last_one(schedule: ac.BudgetSchedule) -> None:
    end = schedule.total_steps - schedule.final
    maskings = [step for step in range(schedule.total_steps + 30) if schedule.is_masking_step(step)]
    between = [step for step in range(schedule.warmup + 1, end) if step % schedule.interval == 0]
    assert maskings == [*between, end]
    assert schedule.freeze_step == end
    last_step = schedule.total_steps - 1 + schedule.first_step
    assert schedule.warmup < end <= last_step, "the last masking must fall on a step of the training"


def test_the_example_of_the_paper() -> None:
    """b0 = 1.5 bT, as in section 4.1, from 864 to 576 triplets."""
    schedule = ac.BudgetSchedule(target_rank=8, total_steps=1100, warmup_steps=100, final_steps=0)
    assert schedule.target_triplets(72, 864) == 576
    assert [schedule.budget(t, 864, 576) for t in (0, 99, 100, 600, 1100)] == [864, 864, 864, 612, 576]


def test_defaults_leave_room_for_all_three_phases() -> None:
    schedule = ac.BudgetSchedule(target_rank=8, total_steps=1000)
    assert (schedule.warmup_steps, schedule.final_steps) == (100, 300)
    for total in range(1, 30):
        for semantics in ("paper", "peft"):
            try:
                schedule = ac.BudgetSchedule(target_rank=8, total_steps=total, semantics=semantics)
            except ConfigError as error:
                assert total == 1, f"only a single step leaves nothing to prune in: {error}"
            else:
                assert schedule.warmup < schedule.freeze_step < total


@pytest.mark.parametrize(
    ("target_rank", "sites", "initial", "expected"),
    [(8, 10, 120, 80), (2.5, 10, 120, 25), (0.3, 10, 120, 3), (8, 10, 60, 60), (1 / 3, 3, 12, 1)],
)
def test_target_is_an_average_and_never_above_the_start(
    target_rank: float, sites: int, initial: int, expected: int
) -> None:
    schedule = ac.BudgetSchedule(target_rank=target_rank, total_steps=10)
    assert schedule.target_triplets(sites, initial) == expected


def test_pefts_names_are_accepted() -> None:
    theirs: dict[str, Any] = {"target_r": 4, "total_step": 100, "tinit": 7, "tfinal": 30, "deltaT": 5}
    assert ac.BudgetSchedule(**theirs) == ac.BudgetSchedule(
        target_rank=4, total_steps=100, warmup_steps=7, final_steps=30, interval=5
    )


def test_it_cannot_be_changed_afterwards() -> None:
    schedule = ac.BudgetSchedule(target_rank=4, total_steps=100)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.total_steps = 200  # type: ignore[misc]
