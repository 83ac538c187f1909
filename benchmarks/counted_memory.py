"""How much memory a device needs to train adapters: counted without the memory, and checked where it can be measured.

    python benchmarks/counted_memory.py                      # an 8 B Llama shape in bfloat16, on 1 to 64 devices
    python benchmarks/counted_memory.py --check              # counted beside measured, for 0.2 B on this CPU
    python benchmarks/counted_memory.py --batch 4 --length 4096 --adapter-rank 16

The step runs on meta tensors, whose operators make no values; what is alive at a time is the size of their storages.
Weights are counted as they lie on a device: NF4 has 4 bits a value, one byte for the scale of 64 values, and a float32
for 256 such scales. With FSDP2 a device has 1/N of the frozen weights, two blocks that are put together at a time and,
throughout the step, what belongs to no block. Adapters, their gradients, optimizer and scores are whole on each, as
``adapter_compiler.integrations.shard`` leaves them; it refuses packed weights, which DDP has whole on each device. What
allocators lose between tensors is not counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import weakref
from typing import Any

import torch
from llama_shapes import SHAPES, make_batch, make_model
from measure import measure_transient_bytes
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import adapter_compiler as ac

DEVICES = (1, 2, 4, 8, 16, 64)
#: By contender: options of the adapters, whether a budget scores them, how many bits a frozen weight takes.
CONTENDERS: dict[str, tuple[dict[str, Any], bool, str]] = {
    "LoRA": ({"kind": "lora"}, False, "dense"),
    "AdaLoRA": ({"kind": "svd"}, True, "dense"),
    "QLoRA": ({"kind": "lora"}, False, "nf4"),
    "AdaLoRA, NF4": ({"kind": "svd"}, True, "nf4"),
}


class LiveBytes(TorchDispatchMode):
    """The bytes of storages that operators have made and that are still alive, and the most of them at a time."""

    def __init__(self) -> None:
        """Start at zero."""
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note the storages of its results."""
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                storage = result.untyped_storage()
                key = storage._cdata
                if key not in self._known and key not in given:
                    self._known[key] = storage.nbytes()
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._forget, key)
        return results

    def _forget(self, key: int) -> None:
        self.now -= self._known.pop(key)


#: Under modes of others, which may change results, W + ΔW is a matrix; this one changes none, as those of torch itself.
LiveBytes.__module__ = "torch"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counted:
    """Bytes of one training step on one device.

    Attributes:
        blocks: frozen weights of the repeated blocks, as they are stored.
        block: the same of the largest block.
        rest: frozen weights that belong to no block.
        adapters: adapters, AdamW's two moments and a budget's two statistics in float32.
        step: the most that forward and backward have at a time beside these; gradients are among it.
        can_shard: whether frozen weights may be sharded; packed ones are whole on each device.
    """

    blocks: int
    block: int
    rest: int
    adapters: int
    step: int
    can_shard: bool

    def on_each_of(self, devices: int) -> int:
        """What each of several devices needs, each with a batch of its own: under FSDP2, or DDP where it must be."""
        if devices == 1 or not self.can_shard:
            return self.blocks + self.rest + self.adapters + self.step
        together = self.rest + 2 * self.block
        return (self.blocks + self.rest) // devices + together + self.adapters + self.step


def count(
    size: str, contender: str, options: argparse.Namespace, *, checkpoints: bool, device: str = "meta"
) -> Counted:
    """Count one contender."""
    settings, has_budget, storage = CONTENDERS[contender]
    dtype = getattr(torch, options.dtype)
    model = make_model(size, dtype, device, attention=register_attention())
    if checkpoints:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    batch = make_batch(model, options.batch, options.length)
    config = ac.AdapterConfig(rank=options.adapter_rank, exclude=("lm_head*", "*embed_tokens*"), **settings)
    adapted = ac.compile_with_adapters(model, config=config).train()
    trained = adapted.trainable_parameters()
    own = sum(map(find_bytes, trained))
    sites = {adapter.site.name for adapter in adapted.plan}
    names = dict(model.named_parameters())
    frozen = {
        name: find_bytes(p) if storage == "dense" or name not in sites else count_nf4(p) for name, p in names.items()
    }
    blocks: dict[str, int] = {}
    for name, size_here in frozen.items():
        if ".layers." in name:
            block = name.split(".layers.")[1].split(".")[0]
            blocks[block] = blocks.get(block, 0) + size_here
    dense = max((find_bytes(names[name]) for name in sites), default=0) if storage == "nf4" else 0
    adapted(**batch).loss.backward()  # a first call looks at more
    adapted.zero_grad()
    live = LiveBytes()
    with live:
        adapted(**batch).loss.backward()
    return Counted(
        blocks=sum(blocks.values()),
        block=max(blocks.values()),
        rest=sum(frozen.values()) - sum(blocks.values()),
        adapters=3 * own + (8 * sum(p.numel() for p in trained) if has_budget else 0),
        step=live.peak + dense,
        can_shard=storage == "dense",
    )


def find_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def count_nf4(weight: torch.Tensor) -> int:
    """4 bits a value, a byte for the scale of 64 values, a float32 for 256 of these."""
    scales = -(-weight.numel() // 64)
    return -(-weight.numel() // 2) + scales + 4 * -(-scales // 256)


def register_attention() -> str:
    """An attention function for transformers that keeps what kernels keep that do not write the scores."""
    from transformers import AttentionInterface

    AttentionInterface.register("counted", attend)
    return "counted"


def attend(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Causal attention, [batch, heads, length, width] to [batch, length, heads, width]."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scale = options.get("scaling")
    if query.device.type == "cpu":
        attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    else:  # without a device, scaled_dot_product_attention falls back to operators that write the scores
        attended = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True, scale=scale)[0]
    return attended.transpose(1, 2).contiguous(), None


def check(options: argparse.Namespace) -> None:
    """Print counted and measured bytes of a step beside each other."""
    print("| contender | checkpoints | counted on meta, MB | measured, MB | ratio |")
    print("|---|---|---:|---:|---:|", flush=True)
    for contender in ("LoRA", "AdaLoRA"):
        for checkpoints in (False, True):
            counted = count(options.check, contender, options, checkpoints=checkpoints).step
            measured = measure(options.check, contender, options, checkpoints)
            yes = "yes" if checkpoints else "no"
            cells = f"{counted / 1e6:.1f} | {measured / 1e6:.1f} | {counted / measured:.2f}"
            print(f"| {contender} | {yes} | {cells} |", flush=True)


def measure(size: str, contender: str, options: argparse.Namespace, checkpoints: bool) -> int:
    """What a step really allocates on this CPU."""
    model = make_model(size, getattr(torch, options.dtype), "cpu", attention=register_attention())
    if checkpoints:
        model.gradient_checkpointing_enable()  # type: ignore[operator]
    batch = make_batch(model, options.batch, options.length)
    config = ac.AdapterConfig(
        rank=options.adapter_rank, exclude=("lm_head*", "*embed_tokens*"), **CONTENDERS[contender][0]
    )
    adapted = ac.compile_with_adapters(model, config=config).train()
    step = lambda: adapted(**batch).loss.backward()  # noqa: E731
    step()
    adapted.zero_grad()
    return measure_transient_bytes(step)


def show(options: argparse.Namespace) -> None:
    """Print the table of the large model."""
    print(f"{options.size} B weights, {options.dtype}, {options.batch}×{options.length} tokens a device, all in GB\n")
    print("| contender | checkpoints | frozen | adapters | step | " + " | ".join(f"{n} dev." for n in DEVICES) + " |")
    print("|---|---|" + "---:|" * (3 + len(DEVICES)), flush=True)
    for contender in CONTENDERS:
        for checkpoints in (False, True):
            found = count(options.size, contender, options, checkpoints=checkpoints)
            totals = [found.on_each_of(n) for n in DEVICES]
            cells = [found.blocks + found.rest, found.adapters, found.step, *totals]
            yes = "yes" if checkpoints else "no"
            print(f"| {contender} | {yes} | {' | '.join(f'{cell / 1e9:.2f}' for cell in cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="8", help="billions of weights")
    parser.add_argument(
        "--check", nargs="?", const="0.2", choices=list(SHAPES), help="compare with this size on the CPU"
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="tokens of a text")
    parser.add_argument("--adapter-rank", type=int, default=12)
    options = parser.parse_args()
    torch.manual_seed(0)
    check(options) if options.check else show(options)


if __name__ == "__main__":
    main()
