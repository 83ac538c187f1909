"""The same as for all tests, only quicker: here are two thousand of them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.soundness.common import seed

#: Situations that docs/how_it_runs.md lists under "What it cannot see".
LIMITS = (
    "data-written",
    "norm-changed-before-backward",
    "gradient-inside",
    "parametrized-later",
    "weight-norm-later",
    "old-spectral-norm-later",
    "parameter-from-itself",
    "AsksForItsClass",
    "fused-copy",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "soundness" and any(
            f"[{limit}" in item.name or f"-{limit}" in item.name for limit in LIMITS
        ):
            pass  # item.add_marker(pytest.mark.xfail(reason="a documented limit: docs/how_it_runs.md", strict=False))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    seed(0)
    np.random.seed(0)
