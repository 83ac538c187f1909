"""Memory and waiting, for whatever device a benchmark runs on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import measure_transient_bytes


def synchronize(device: torch.device) -> None:
    """Wait until a device has done all that was asked of it; on a CPU nothing is to be waited for."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def measure_peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most that one step has allocated at a time beyond what was allocated before it."""
    if device.type != "cuda":
        return measure_transient_bytes(step)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before
