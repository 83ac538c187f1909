"""Fine-tune a transformer whose weights are kept in four bits (QLoRA), with checkpoints, and generate with it.

    python examples/libraries/03_qlora_transformer.py

A small Llama learns to count up. Then its linear layers go into NF4, which takes an eighth of the memory of float32,
and adapters teach it to count down: gradients run through the unpacked weights, and with gradient checkpointing a block
is computed again in backward rather than kept. The folded model is transformers' own class, in full precision: the
unpacked weights that the adapters were trained over, with ΔW added.
Needs ``pip install 'adapter-compiler[hf,qlora]'``.
"""

from __future__ import annotations

import importlib.util
import sys
from typing import Any

import torch

import adapter_compiler as ac

NUMBERS, LENGTH, PROMPT, STEPS = 32, 10, 4, 80


def make_rows(step: int, starts: torch.Tensor) -> torch.Tensor:
    """Rows of numbers that go up or down by one, around a circle."""
    return (torch.arange(LENGTH) * step + starts[:, None]) % NUMBERS


def train(model: Any, parameters: list[torch.nn.Parameter], step: int, rate: float) -> ac.RankBudget | None:
    """Train, with a rank budget if the model has adapters."""
    optimizer = torch.optim.AdamW(parameters, lr=rate)
    schedule = ac.BudgetSchedule(target_rank=4, total_steps=STEPS)
    budget = ac.RankBudget(model, optimizer, schedule) if isinstance(model, ac.AdaptedModel) else None
    model.train()
    for _ in range(STEPS):
        rows = make_rows(step, torch.randint(NUMBERS, (16,)))
        model(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return budget


def count_right(model: Any, step: int) -> float:
    """The share of numbers that ``generate`` continues as it should."""
    rows = make_rows(step, torch.arange(0, NUMBERS, 2))
    prompt = rows[:, :PROMPT]
    options = {"max_new_tokens": LENGTH - PROMPT, "min_new_tokens": LENGTH - PROMPT, "do_sample": False}
    made = model.generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    return float((made[:, PROMPT:] == rows[:, PROMPT:]).float().mean())


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, num_key_value_heads=2, eos_token_id=None, **sizes))
    train(model, list(model.parameters()), 1, 1e-2)

    example = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}
    config = ac.AdapterConfig(rank=6, alpha=12, quantize="nf4")
    adapted: Any = ac.compile_with_adapters(model, example_kwargs=example, config=config)
    packed = adapted.quantization_report
    adapted.gradient_checkpointing_enable()
    before = count_right(adapted.eval(), -1)
    budget = train(adapted, adapted.trainable_parameters(), -1, 2e-2)
    merged = adapted.fold()

    after, folded, plain = count_right(adapted, -1), count_right(merged, -1), count_right(model, 1)
    shares = f"{before:.0%} before, {after:.0%} adapted, {folded:.0%} folded"
    print(f"{len(packed.errors)} weights in nf4: {packed.bytes_before:,} bytes before, {packed.bytes_after:,} after")
    print(f"counts down: {shares}; the base counts up: {plain:.0%}")
    assert budget is not None and budget.live_triplets == 4 * len(adapted.sites), "the budget is met exactly"
    assert packed.bytes_after < packed.bytes_before / 3, "four bits take less memory"
    assert after == folded > max(0.9, before), "the adapters should have learned to count down"
    assert plain > 0.9, "the base model has not changed"
    assert type(merged) is LlamaForCausalLM


if __name__ == "__main__":
    if missing := [name for name in ("transformers", "bitsandbytes") if importlib.util.find_spec(name) is None]:
        print(f"skipped: {missing[0]} is not installed; pip install 'adapter-compiler[hf,qlora]'")
        sys.exit()
    main()
