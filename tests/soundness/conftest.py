"""A faster version of the fixtures of all tests, because there are two thousand tests here."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.soundness.common import seed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed(0)
    np.random.seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Dynamo without compiled code and with its counters at zero, before and after."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()
