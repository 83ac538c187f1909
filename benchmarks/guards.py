"""What it costs a call that adapters are seen wherever Python reads a weight, beside the arithmetic of the adapters.

    ./run python benchmarks/guards.py                 # MiniLM-L6, 2 × 16 tokens, one thread
    ./run python benchmarks/guards.py --rounds 200

No graph answers calls, so there is nothing to guard at a call but this: whether modules still stand where they stood,
whether something took a parameter's place (``functional_call``), and, at each read of a weight, whether this thread
sees the adapters and which tensors they are. Each is timed alone, as often as a step does it, and set beside the step.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from training_contenders import make_minilm, make_ours

from adapter_compiler.model.dispatch.attach import find_replaced
from adapter_compiler.model.dispatch.scope import calling
from adapter_compiler.model.dispatch.slots import SLOTS
from adapter_compiler.model.dispatch.weights.adapted_weight import make_adapted_weight


def measure(action: Callable[[], object], rounds: int) -> float:
    """The median of the seconds that ``action`` takes."""
    found = []
    for _ in range(rounds):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    work = make_minilm(2, 16)
    contender = make_ours(work)
    adapted = contender.model
    slots = [
        (module, leaf, slot, module._parameters[leaf])
        for module in adapted.module.modules()
        for leaf, slot in module.__dict__.get(SLOTS, {}).items()
    ]

    def look_at_places() -> bool:
        return all(place.is_unchanged for place in adapted._places)

    def enter_call() -> None:
        with calling(adapted._token, find_replaced(adapted._adapted_attributes)):
            pass

    def bind_all() -> None:
        for module, leaf, slot, weight in slots:
            slot.bind(module, leaf, weight)

    def read_all() -> None:
        for module, leaf, slot, weight in slots:
            make_adapted_weight(weight, slot.bind(module, leaf, weight), fused=True, site=slot.weight)

    for _ in range(3):
        contender.step()
    step = measure(contender.step, options.rounds)
    print(f"MiniLM-L6 2×16, {len(slots)} adapted weights, a training step: {1e3 * step:.1f} ms")
    print("| what | µs a call | of a step |")
    print("|---|---:|---:|")
    parts = {
        "modules stand where they stood": look_at_places,
        "nothing took a parameter's place": enter_call,
        f"{len(slots)} reads: are adapters seen, and which tensors are they": bind_all,
        f"{len(slots)} reads of the attribute itself (not done for nn.Linear)": read_all,
    }
    total = 0.0
    for name, action in parts.items():
        spent = measure(action, 20 * options.rounds)
        total += spent if action is not read_all else 0.0
        print(f"| {name} | {1e6 * spent:.1f} | {spent / step:.2%} |")
    print(f"guards of a call: {1e6 * total:.1f} µs, {total / step:.2%} of a step")


if __name__ == "__main__":
    main()
