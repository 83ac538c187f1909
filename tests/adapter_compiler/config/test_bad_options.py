"""Options that cannot work: the message names the option, its value, what was expected, and a value that works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import adapter_compiler as ac
from adapter_compiler.errors import ConfigError
from tests.adapter_compiler.config.mistakes import Mistake, Mistakes, assert_message


def config(**options: Any) -> ac.AdapterConfig:
    return ac.AdapterConfig(**options)


def schedule(**options: Any) -> ac.BudgetSchedule:
    return ac.BudgetSchedule(**{"target_rank": 8, "total_steps": 100} | options)


def option(owner: str, name: str, value: Any, expected: str, advice: str) -> Mistake:
    """An option with a wrong value."""
    make = config if owner == "AdapterConfig" else schedule
    parts = (f"{owner}({name}=", f"={value!r})", f"expected {expected}", advice)
    return lambda _: make(**{name: value}), ConfigError, " | ".join(parts)


WHOLE, POSITIVE = "an integer of at least 1", "a finite number > 0"
GLOBS = "a glob or globs"

VALUES: Mistakes = {
    "rank zero": option("AdapterConfig", "rank", 0, WHOLE, "for example rank=12"),
    "rank of a fraction": option("AdapterConfig", "rank", 2.5, WHOLE, "for example rank=12"),
    "rank of a flag": option("AdapterConfig", "rank", True, WHOLE, "for example rank=12"),
    "alpha negative": option("AdapterConfig", "alpha", -1, POSITIVE, "for example alpha=16.0"),
    "alpha nan": option("AdapterConfig", "alpha", float("nan"), POSITIVE, "for example alpha=16.0"),
    "alpha as text": option("AdapterConfig", "alpha", "16", POSITIVE, "for example alpha=16.0"),
    "gamma negative": option("AdapterConfig", "gamma", -0.1, "a finite number >= 0", "for example gamma=0.1"),
    "start without noise": option("AdapterConfig", "init_std", 0, POSITIVE, "for example init_std=0.02"),
    "start with noise beyond floats": option(
        "AdapterConfig", "init_std", 10**400, POSITIVE, "for example init_std=0.02"
    ),
    "dtype of integers": option("AdapterConfig", "dtype", torch.int8, "a floating-point", "as in dtype=torch.float32"),
    "dtype as text": option("AdapterConfig", "dtype", "float32", "a floating-point", "as in dtype=torch.float32"),
    "flag as text": option("AdapterConfig", "fused", "no", "True or False", "for example fused=True"),
    "flag as number": option("AdapterConfig", "inplace", 1, "True or False", "for example inplace=False"),
    "unknown capture": option("AdapterConfig", "capture", "on", "one of 'auto', 'off'", "for example capture='auto'"),
    "sites of a number": option("AdapterConfig", "sites", 3, GLOBS, "as in sites=('*.query'"),
    "empty glob": option("AdapterConfig", "exclude", [""], GLOBS, "as in exclude=('*.query'"),
    "trainable of a number": option("AdapterConfig", "trainable", 5, GLOBS, "as in trainable=('*.query'"),
    "target of zero": option("BudgetSchedule", "target_rank", 0, POSITIVE, "for example target_rank=8"),
    "target as text": option("BudgetSchedule", "target_rank", "8", POSITIVE, "for example target_rank=8"),
    "no steps": option("BudgetSchedule", "total_steps", 0, WHOLE, "for example total_steps=1000"),
    "half a step": option("BudgetSchedule", "total_steps", 99.5, WHOLE, "for example total_steps=1000"),
    "warm-up negative": option("BudgetSchedule", "warmup_steps", -1, "an integer of at least 0", "leave it out"),
    "interval of zero": option("BudgetSchedule", "interval", 0, WHOLE, "for example interval=10"),
    "semantics misspelt": option("BudgetSchedule", "semantics", "papre", "one of 'paper', 'peft'", "for example sem"),
    "average of everything": option("BudgetSchedule", "beta1", 1, "a finite number >= 0 and < 1", "example beta1=0.85"),
}

NAMES_AND_PHASES: Mistakes = {
    "nothing selected": (
        lambda _: config(sites=()),
        ConfigError,
        "AdapterConfig(sites= | ()) selects nothing | expected 'all-linear', 'auto' or globs | as in sites='*.query'",
    ),
    "option misspelt": (
        lambda _: config(rnak=3),
        ConfigError,
        "AdapterConfig | no option 'rnak' | there are: rank, alpha | did you mean 'rank'?",
    ),
    "option unknown": (
        lambda _: schedule(zzz=3),
        ConfigError,
        "BudgetSchedule | no option 'zzz' | there are: target_rank, total_steps | leave it out",
    ),
    "option twice": (
        lambda _: config(r=4, rank=5),
        ConfigError,
        "AdapterConfig | r=4 and rank=5 | expected the option 'rank' once | give one of them",
    ),
    "schedule without end": (
        lambda _: schedule(warmup_steps=60, final_steps=40),
        ConfigError,
        "warmup_steps=60 + final_steps=40 | never ends | "
        "no step of total_steps=100 to prune in | make their sum smaller",
    ),
    "peft's schedule without last masking": (
        lambda _: schedule(semantics="peft", final_steps=0),
        ConfigError,
        "final_steps | =0) | an integer of at least 1 | leave it out for the default",
    ),
}


@pytest.mark.parametrize("case", VALUES)
def test_a_wrong_value(case: str, tmp_path: Path) -> None:
    assert_message(VALUES[case], tmp_path)


@pytest.mark.parametrize("case", NAMES_AND_PHASES)
def test_a_wrong_name_or_combination(case: str, tmp_path: Path) -> None:
    assert_message(NAMES_AND_PHASES[case], tmp_path)
