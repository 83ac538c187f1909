"""Real sizes: Llama shapes of 0.2 to 1.2 billion weights: time and memory beside peft and the bare model.

    python benchmarks/real_size.py                                   # 0.2 B, float32, on the CPU
    python benchmarks/real_size.py --size 1.2 --dtype bfloat16 --device cuda --compiled

Weights are random. Contenders take turns in one process (see ``measure.py``); memory is measured apart from time.
"""

from __future__ import annotations

import argparse
import gc
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from device_memory import measure_peak_bytes, synchronize
from llama_shapes import SHAPES, make_batch, make_model
from measure import CLOCKS, measure_times
from torch import nn
from torch.export import Dim

import adapter_compiler as ac
from passes.capture.submodules import find_repeated_modules

RANK, TARGET, ALPHA = 12, 8, 16.0
Step = Callable[[], None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="0.2", help="billions of weights")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", default="cpu", help="such as cpu, cuda, cuda:1")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=128, help="tokens of a text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall", help="cpu: steadier on a busy machine")
    parser.add_argument("--threads", type=int, default=None, help="of each kernel; torch's own number by default")
    parser.add_argument("--memory", type=int, default=20, metavar="GIB", help="more memory of the host is refused")
    parser.add_argument("--compiled", action="store_true", help="add contenders with torch.compile")
    parser.add_argument("--qlora", action="store_true", help="add ours with weights in NF4 (needs bitsandbytes)")
    parser.add_argument("--no-files", action="store_true", help="leave out saving, folding and exporting")
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_DATA, (options.memory << 30, options.memory << 30))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    for line in measure(options):
        print(line, flush=True)


def measure(options: argparse.Namespace) -> Any:
    """The lines of the report."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    base = make_model(options.size, dtype, device)
    batch = make_batch(base, options.batch, options.length)
    weights = sum(p.numel() for p in base.parameters())
    yield f"## {weights / 1e9:.2f} B weights, {options.dtype}, {options.batch}×{options.length} tokens, {device}"
    yield ""
    start = time.perf_counter()
    adapted = adapt(base, batch)
    yield f"- compile: {time.perf_counter() - start:.1f} s, {len(adapted.sites)} weights with adapters"
    yield ""
    steps = make_steps(base, adapted, batch, options)
    firsts = {name: measure_seconds(step, device) for name, step in steps.items()}
    timed = {name: synchronized(step, device) for name, step in steps.items()}
    timing = measure_times(timed, options.rounds, CLOCKS[options.clock], warmup=1)
    peaks = {name: measure_peak_bytes(step, device) for name, step in steps.items()}
    yield "| contender | first step s | step ms | to floor | to peft LoRA | peak MB above what stays |"
    yield "|---|" + "---:|" * 5
    for name in steps:
        ratios = " | ".join(f"{timing.ratio(name, to):.3f}" for to in ("floor", "peft LoRA r8"))
        yield (
            f"| {name} | {firsts[name]:.1f} | {1e3 * timing.median(name):.0f} | {ratios} | {peaks[name] / 1e6:.0f} |"
        )
    yield ""
    if not options.no_files:
        steps.clear()
        gc.collect()
        yield from measure_files(base, adapted, batch)


def make_steps(base: nn.Module, adapted: ac.AdaptedModel, batch: dict[str, Any], options: Any) -> dict[str, Step]:
    """A step of each contender."""
    steps = {"floor": make_floor(base, batch), "ours": make_ours(adapted, batch)}
    steps["peft LoRA r8"] = make_peft(base, batch, "lora")
    steps["peft AdaLoRA"] = make_peft(base, batch, "adalora")
    if options.compiled:
        other = adapt(base, batch)
        other.compile()
        steps["ours, compiled"] = make_ours(other, batch)
        steps["peft LoRA, compiled"] = make_peft(base, batch, "lora", compiled=True)
    if options.qlora:
        steps["ours, NF4"] = make_ours(adapt(base, batch, quantize="nf4"), batch)
    return steps


def adapt(base: nn.Module, batch: dict[str, Any], **options: Any) -> ac.AdaptedModel:
    config = ac.AdapterConfig(rank=RANK, alpha=ALPHA, exclude=("lm_head*", "*embed_tokens*"), **options)
    return ac.compile_with_adapters(base, example_kwargs=batch, config=config).train()


def make_floor(base: nn.Module, batch: dict[str, Any]) -> Step:
    """Forward, and backward for activations only: what any training of adapters must compute."""
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    inner = {name: value for name, value in batch.items() if name != "input_ids"}
    with torch.no_grad():
        embedded = base.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]

    def step() -> None:
        base(inputs_embeds=embedded.detach().requires_grad_(), **inner).loss.backward()

    return step


def make_ours(adapted: ac.AdaptedModel, batch: dict[str, Any]) -> Step:
    optimizer = torch.optim.AdamW(adapted.trainable_parameters(), lr=1e-4, fused=True)
    schedule = ac.BudgetSchedule(target_rank=TARGET, total_steps=100_000, warmup_steps=0, interval=10)
    ac.RankBudget(adapted, optimizer, schedule)
    return make_step(adapted, optimizer, batch)


def make_peft(base: nn.Module, batch: dict[str, Any], kind: str, *, compiled: bool = False) -> Step:
    """PEFT on modules of its own that share the base weights."""
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if kind == "lora":
        config: Any = LoraConfig(r=TARGET, lora_alpha=ALPHA, target_modules=targets)
    else:
        config = AdaLoraConfig(
            init_r=RANK, target_r=TARGET, lora_alpha=ALPHA, total_step=100_000, tfinal=10, target_modules=targets
        )
    model: Any = get_peft_model(share_weights(base), config).train()  # type: ignore[arg-type]
    if compiled:
        for name in find_repeated_modules(model):
            model.get_submodule(name).compile()
    parameters = [p for p in model.parameters() if p.requires_grad and p.is_floating_point()]
    step, count = make_step(model, torch.optim.AdamW(parameters, lr=1e-4, fused=True), batch, clear=False), 0

    def run() -> None:
        nonlocal count
        step()
        if kind == "adalora":
            model.base_model.update_and_allocate(count)
        model.zero_grad()
        count += 1

    return run


def share_weights(base: nn.Module) -> nn.Module:
    """A copy of the modules whose parameters and buffers share the memory of the original ones."""
    import copy

    memo = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in base.parameters()}
    return copy.deepcopy(base, memo)


def make_step(model: nn.Module, optimizer: Any, batch: dict[str, Any], *, clear: bool = True) -> Step:
    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        if clear:
            optimizer.zero_grad()

    return step


def measure_seconds(step: Step, device: torch.device) -> float:
    start = time.perf_counter()
    synchronized(step, device)()
    return time.perf_counter() - start


def synchronized(step: Step, device: torch.device) -> Step:
    def run() -> None:
        step()
        synchronize(device)

    return run


def measure_files(base: nn.Module, adapted: ac.AdaptedModel, batch: dict[str, Any]) -> Any:
    """Times of saving, folding and exporting beside the same of the bare model."""
    inputs = {name: value.cpu() for name, value in batch.items() if name == "input_ids"}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        yield f"- save adapters: {timed(lambda: adapted.save(path / 'adapters')):.2f} s"
        folded: list[nn.Module] = []
        yield f"- fold: {timed(lambda: folded.append(adapted.fold())):.1f} s"
        bare = folded[0].cpu().eval()
        program: list[Any] = []

        def export_bare() -> None:
            # With as many open sizes as ours has; sizes of one would be fixed.
            larger = {name: value.repeat(2, 1) for name, value in inputs.items()}
            sizes = {name: {0: Dim.DYNAMIC, 1: Dim.DYNAMIC} for name in inputs}
            program.append(torch.onnx.export(bare, (), kwargs=larger, dynamo=True, dynamic_shapes=sizes))
            program.pop().save(path / "bare.onnx", external_data=True)

        plain = timed(export_bare)
        adapted.cpu().eval()
        own = timed(lambda: ac.export_onnx(adapted, path / "model.onnx", example_kwargs=inputs))
        yield f"- export, verified: {own:.1f} s; torch.onnx.export of the bare model, not verified: {plain:.1f} s"


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
