"""Time and memory of training steps on a machine that is never quiet.

Contenders take turns in one process, so that whatever else runs slows all of them; what is reported is the
median over the rounds of the ratio to another contender in the same round.
"""

from __future__ import annotations

import dataclasses
import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

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


def profile_parts(step: Callable[[], None], ranks: Collection[int], steps: int = 5) -> dict[str, float]:
    """Shares of the time of a step of ours, by kind of work.

    Args:
        step: what is profiled.
        ranks: sizes that only products with adapters have.
        steps: how often it runs.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        for _ in range(steps):
            step()
    averages = profile.key_averages(group_by_input_shape=True)
    total = sum(event.self_cpu_time_total for event in averages)
    parts: dict[str, float] = {}
    for event in averages:
        part = _name_part(event, ranks)
        if part is not None:
            parts[part] = parts.get(part, 0.0) + event.self_cpu_time_total
    stepping = sum(e.cpu_time_total for e in averages if e.key.startswith("Optimizer.step#"))
    parts["scores, mask, regularizer"] = stepping - parts.get("optimizer's kernel", 0.0)
    parts["everything else"] = total - sum(parts.values())
    return {name: time / total for name, time in parts.items()}


def _name_part(event: Any, ranks: Collection[int]) -> str | None:
    """The kind of work of a kernel."""
    if event.key in ("aten::mm", "aten::addmm", "aten::addmm_"):
        sizes = {size for shape in event.input_shapes for size in shape}
        return "products with adapters" if sizes.intersection(ranks) else "products with frozen weights"
    return next((part for part, keys in _KERNELS.items() if event.key in keys), None)


_KERNELS = {
    "attention": (
        "aten::_softmax",
        "aten::_softmax_backward_data",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::baddbmm",
        "aten::bmm",
    ),
    "random numbers": ("aten::bernoulli_",),
    "activation functions": ("aten::gelu", "aten::gelu_backward", "aten::tanh", "aten::tanh_backward"),
    "optimizer's kernel": ("aten::_fused_adamw_",),
}
