"""Every test draws the same random numbers in every run, alone or among others."""

from __future__ import annotations

import numpy as np
import pytest
import torch

torch.manual_seed(0)  # what test modules draw as they are imported


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
    np.random.seed(0)
