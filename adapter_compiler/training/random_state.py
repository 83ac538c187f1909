"""Read and restore the states of all random number generators that a training loop may use."""

from __future__ import annotations

import random
import sys
from collections.abc import Mapping
from typing import Any

import torch


def read_random_state() -> dict[str, Any]:
    """The states of torch (CPU and each accelerator device), Python and, if it is imported, numpy."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    if torch.backends.mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    if "numpy" in sys.modules:
        name, keys, position, has_gauss, gauss = sys.modules["numpy"].random.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss)
    return state


def make_random_state(seed: int) -> dict[str, Any]:
    """The states that all generators of :func:`read_random_state` have when they are seeded with a number."""
    state: dict[str, Any] = {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "python": random.Random(seed).getstate(),
    }
    if torch.cuda.is_available():
        devices = [torch.device("cuda", number) for number in range(torch.cuda.device_count())]
        state["cuda"] = [torch.Generator(device).manual_seed(seed).get_state() for device in devices]
    if torch.backends.mps.is_available():
        state["mps"] = torch.Generator("mps").manual_seed(seed).get_state()
    if "numpy" in sys.modules:
        generator = sys.modules["numpy"].random.RandomState(seed % (1 << 32))
        name, keys, position, has_gauss, gauss = generator.get_state()
        state["numpy"] = (name, torch.from_numpy(keys.astype("int64")), position, has_gauss, gauss)
    return state


def write_random_state(state: Mapping[str, Any]) -> None:
    """Restore a state of :func:`read_random_state`; states of devices that this machine does not have are skipped."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"][: torch.cuda.device_count()])
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "numpy" in state:
        import numpy as np

        name, keys, *rest = state["numpy"]
        np.random.set_state((name, keys.numpy().astype("uint32"), *rest))
