"""What one training step costs, against PEFT and against the least that it can cost.

    python benchmarks/training_step.py                       # everything; writes docs/training_step.md
    python benchmarks/training_step.py --work minilm-small --rounds 20 --output /dev/stdout

Contenders take turns in one process (see ``measure.py``); memory is measured apart from time.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import platform
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from measure import CLOCKS, Timing, measure_live_bytes, measure_times, measure_transient_bytes, profile_parts
from training_contenders import (
    RANK,
    Contender,
    Workload,
    make_captured,
    make_compacted,
    make_floor,
    make_full,
    make_gpt2,
    make_minilm,
    make_muon,
    make_ours,
    make_ours_compiled,
    make_peft_adalora,
    make_peft_lora,
    make_peft_lora_compiled,
    make_peft_lora_with_ranks,
    make_vit,
    measure_optimizer_share,
)

WORKLOADS: dict[str, Callable[[], Workload]] = {
    "minilm": lambda: make_minilm(16, 64),
    "minilm-small": lambda: make_minilm(2, 16),
    "vit": lambda: make_vit(16),
    "gpt2": lambda: make_gpt2(8, 64),
}

#: (contender, compared with): ratios that are written below each table.
COMPARED = (
    ("ours", "peft AdaLoRA"),
    ("ours", "peft LoRA r8"),
    ("ours", "floor"),
    ("ours, compacted", "peft LoRA, same ranks"),
    ("ours, AdapterMuon", "ours"),
)

NOTES = "\n## Notes\n"

HEAD = """\
# What a training step costs

`./run python benchmarks/training_step.py`, {rounds} rounds, {clock} clock, {threads} threads, torch {torch}, {machine}.

Forward, backward, optimizer step (AdamW, fused, for all) and zero_grad of all-MiniLM-L6-v2, a ViT and a GPT-2
(random weights), in training mode with dropout. *floor* is the captured graph without adapters, with gradients
of the activations only: what any training of adapters must compute. *ours* has rank 12 on its way to 8, as
peft's AdaLoRA; *all kept* is the same without computing cheap activations again; *captured* runs the graph that
`AdaptedModel.capture` gives instead of the model's Python; *AdapterMuon* steps with the optimizer of
`adapted.make_optimizer`; *compacted* is what is left of it after the schedule. Ratios are medians over rounds in
which the contenders take turns; below 1 is faster. Memory is what stands above the model's own weights.
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes beyond the model: what stays between steps, and the most that a step needs besides."""

    live: int
    transient: int

    @property
    def peak(self) -> int:
        """Both together."""
        return self.live + self.transient


@dataclasses.dataclass(frozen=True, kw_only=True)
class Result:
    """One workload's measurements."""

    key: str
    name: str
    timing: Timing
    memory: Mapping[str, Memory]
    parts: Mapping[str, float]
    optimizer_share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="*", default=list(WORKLOADS), choices=list(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: steadier on a busy machine")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs" / "training_step.md")
    parser.add_argument("--compiled", action="store_true", help="add contenders with torch.compile (minutes each)")
    parser.add_argument("--threads", type=int, default=None, help="of each kernel; torch's own number by default")
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    results = [run(key, options.rounds, CLOCKS[options.clock], options.compiled) for key in options.work]
    notes = read_notes(options.output)
    options.output.write_text(write_report(results, options.rounds, options.clock) + notes)
    print(f"wrote {options.output}")


def run(key: str, rounds: int, clock: Callable[[], float], is_compiled: bool = False) -> Result:
    """Measure all contenders on one workload."""
    torch.manual_seed(0)
    work = WORKLOADS[key]()
    contenders: dict[str, Contender] = {}
    memory: dict[str, Memory] = {}
    for make in [*list_makers(work), *(list_compiled(work) if is_compiled else [])]:
        before = measure_live_bytes()
        contender = make()
        for _ in range(2):
            contender.step()
        live = measure_live_bytes() - before - contender.copied_bytes
        memory[contender.name] = Memory(live=max(0, live), transient=measure_transient_bytes(contender.step))
        contenders[contender.name] = contender
    compacted = contenders["ours, compacted"].budget
    assert compacted is not None
    fair = make_peft_lora_with_ranks(work, compacted.ranks())
    contenders[fair.name] = fair
    timing = measure_times({name: one.step for name, one in contenders.items()}, rounds, clock)
    parts = profile_parts(contenders["ours"].step, [RANK * n for n in range(1, 5)])
    share = measure_optimizer_share(work, rounds, clock)
    result = Result(key=key, name=work.name, timing=timing, memory=memory, parts=parts, optimizer_share=share)
    print("\n".join(write_section(result)), flush=True)
    return result


def list_makers(work: Workload) -> list[Callable[[], Contender]]:
    """How to make each contender."""
    return [
        functools.partial(make_floor, work),
        functools.partial(make_ours, work, "ours, unfused", fused=False),
        functools.partial(make_ours, work),
        functools.partial(make_ours, work, "ours, all kept", recompute=False),
        functools.partial(make_muon, work),
        functools.partial(make_captured, work),
        functools.partial(make_compacted, work),
        functools.partial(make_peft_lora, work),
        functools.partial(make_peft_adalora, work),
        functools.partial(make_full, work),
    ]


def list_compiled(work: Workload) -> list[Callable[[], Contender]]:
    """How to make the contenders that run under torch.compile."""
    return [
        functools.partial(make_floor, work, "floor, compiled", torch.compile),
        functools.partial(make_ours_compiled, work),
        functools.partial(make_peft_lora_compiled, work),
    ]


def write_report(results: list[Result], rounds: int, clock: str) -> str:
    """The whole document."""
    threads, machine = torch.get_num_threads(), platform.machine()
    head = HEAD.format(rounds=rounds, clock=clock, threads=threads, torch=torch.__version__, machine=machine)
    return head + "\n" + "\n".join(line for result in results for line in write_section(result))


def read_notes(path: Path) -> str:
    """What people have written under the tables of an earlier report."""
    _, mark, notes = path.read_text().partition(NOTES) if path.is_file() else ("", "", "")
    return mark + notes


def write_section(result: Result) -> list[str]:
    """A workload's table and its main ratios."""
    return [f"## {result.name}", "", *write_table(result), "", *write_ratios(result), ""]


def write_table(result: Result) -> list[str]:
    """Times, ratios and memory of one workload."""
    columns = ("floor", "peft LoRA r8", "peft AdaLoRA")
    heads = ["contender", "ms", *(f"to {name}" for name in columns), "peak MB", "between steps MB"]
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for name in result.timing.seconds:
        ratios = [f"{result.timing.ratio(name, to):.3f}" for to in columns]
        memory = result.memory.get(name)
        sizes = ["", ""] if memory is None else [f"{memory.peak / 1e6:.1f}", f"{memory.live / 1e6:.1f}"]
        lines.append("| " + " | ".join([name, f"{1e3 * result.timing.median(name):.1f}", *ratios, *sizes]) + " |")
    return lines


def write_ratios(result: Result) -> list[str]:
    """The ratios of :data:`COMPARED` and those of memory, and where the time of our step goes."""
    seconds = result.timing.seconds
    pairs = [(name, to) for name, to in COMPARED if name in seconds and to in seconds]
    lines = [f"- {name} to {to}: {result.timing.ratio(name, to):.3f}" for name, to in pairs]
    for name in ("ours", "ours, all kept"):
        found = result.memory[name].peak / result.memory["peft AdaLoRA"].peak
        lines.append(f"- memory of {name} to peft AdaLoRA: {found:.3f}")
    lines.append(f"- AdapterMuon's own step to a whole step with it, without a budget: {result.optimizer_share:.2%}")
    parts = ", ".join(f"{name} {share:.1%}" for name, share in result.parts.items())
    return [*lines, f"- our step is made of: {parts}"]


if __name__ == "__main__":
    main()
