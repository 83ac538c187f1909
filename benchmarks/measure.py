"""Time and memory of training steps on a machine that is never quiet.

Contenders take turns in one process, so that whatever else runs slows all of them; what is reported is the
median over the rounds of the ratio to another contender in the same round.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch

#: Wall time is what a user waits for; the process's CPU time is steadier while other programs compete.
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of each contender's step, one a round, in the same order of rounds for all."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        """The median step of one contender in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> float:
        """The median of the ratios within each round."""
        return statistics.median(a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True))


def measure_times(
    steps: Mapping[str, Callable[[], None]],
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
    warmup: int = 3,
) -> Timing:
    """Let the contenders take turns; the order is reversed in every other round."""
    for step in steps.values():
        for _ in range(warmup):
            step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    names = list(steps)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            for name in names if index % 2 else reversed(names):
                start = clock()
                steps[name]()
                seconds[name].append(clock() - start)
    finally:
        gc.enable()
    return Timing(seconds=seconds)


def measure_live_bytes() -> int:
    """Bytes of all tensors that Python holds, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, torch.Tensor) and kind.__name__ != "FakeTensor" and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def measure_transient_bytes(step: Callable[[], None]) -> int:
    """The most that one step has allocated at a time beyond what was allocated before it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    level = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        level += event.nbytes()
        highest = max(highest, level)
    return highest


def profile_parts(step: Callable[[], None], steps: int = 5) -> dict[str, float]:
    """Shares of the time of a step of ours, by kind of work."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(steps):
            step()
    averages = profile.key_averages()
    total = sum(event.self_cpu_time_total for event in averages)
    whole = {event.key: event.cpu_time_total for event in averages}
    names = ("_FusedLinears", "_FusedUpdate", "_FusedLinearsBackward", "_FusedUpdateBackward")
    fused = sum(whole.get(name, 0.0) for name in names)
    stepping = sum(time for key, time in whole.items() if key.startswith("Optimizer.step#"))
    kernel = sum(time for key, time in whole.items() if key.startswith("aten::_fused_adam"))
    return {
        "base layers with their adapters": fused / total,
        "optimizer's kernel": kernel / total,
        "scores, mask, regulariser and the hooks around the kernel": (stepping - kernel) / total,
        "the rest of the model": (total - fused - stepping) / total,
    }
