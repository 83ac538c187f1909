"""A faster version of the fixtures of all tests, because there are two thousand tests here."""

from __future__ import annotations

import numpy as np
import pytest

from tests.soundness.common import seed


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed(0)
    np.random.seed(0)
