"""Every test draws the same random numbers in every run, alone or among others, in any order."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch


def seed_all() -> None:
    """Fix what torch, NumPy and Python draw from now on."""
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


seed_all()  # what test modules draw as they are imported


def pytest_configure(config: pytest.Config) -> None:
    """Let pytest-randomly shuffle tests, but not seed them: it would do so after the fixtures."""
    if hasattr(config.option, "randomly_reset_seed"):
        config.option.randomly_reset_seed = False


@pytest.hookimpl(tryfirst=True)
def pytest_fixture_setup(fixturedef: pytest.FixtureDef[object]) -> None:
    """Fixtures that several tests share draw the same, whichever test comes first."""
    if fixturedef.scope != "function":
        seed_all()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed_all()
