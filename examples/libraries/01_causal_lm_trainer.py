"""Fine-tune a causal language model with transformers' Trainer, prune its ranks, and generate with it.

    python examples/libraries/01_causal_lm_trainer.py

A tiny Llama learns to count up; then adapters teach it to count down while its own weights stay as they are. The budget
is one line, a callback; Trainer says how many steps there are, and writes the budget into its checkpoints. Before and
after, the model continues a row of numbers. The folded model is transformers' own class again and writes the same.
Needs ``pip install 'adapter-compiler[integrations]'``.
"""

from __future__ import annotations

import importlib.util
import sys
import tempfile
from typing import Any

import torch

import adapter_compiler as ac

NUMBERS, LENGTH, PROMPT = 32, 12, 4


def make_rows(step: int, count: int) -> list[dict[str, torch.Tensor]]:
    """Rows of numbers that go up or down by one, around a circle."""
    rows = [(torch.arange(LENGTH) * step + start) % NUMBERS for start in torch.randint(0, NUMBERS, (count,)).tolist()]
    return [{"input_ids": row, "labels": row} for row in rows]


def train(model: Any, rows: list[dict[str, torch.Tensor]], folder: str, rate: float, *callbacks: Any) -> None:
    from transformers import Trainer, TrainingArguments

    options: dict[str, Any] = {"report_to": [], "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
    arguments = TrainingArguments(
        folder, max_steps=120, per_device_train_batch_size=32, learning_rate=rate, logging_steps=60, **options
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)).train()


def count_right(model: Any, step: int) -> float:
    """The share of numbers that ``generate`` continues as it should."""
    rows = torch.stack([(torch.arange(LENGTH) * step + start) % NUMBERS for start in range(NUMBERS)])
    options = {"max_new_tokens": LENGTH - PROMPT, "min_new_tokens": LENGTH - PROMPT, "do_sample": False}
    prompt = rows[:, :PROMPT]
    made = model.eval().generate(prompt, attention_mask=torch.ones_like(prompt), pad_token_id=0, **options)
    return float((made[:, PROMPT:] == rows[:, PROMPT:]).float().mean())


def main() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    from adapter_compiler.integrations import TrainerBudget

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=NUMBERS, num_key_value_heads=2, eos_token_id=None, **sizes))
    with tempfile.TemporaryDirectory() as folder:
        train(model, make_rows(1, 512), folder, 1e-2)
        config = ac.AdapterConfig(rank=8, alpha=16)
        example = {"input_ids": torch.zeros(1, LENGTH, dtype=torch.long)}
        adapted: Any = ac.compile_with_adapters(model, example_kwargs=example, config=config)
        before = count_right(adapted, -1)
        budget = TrainerBudget(target_rank=4)
        train(adapted, make_rows(-1, 512), folder, 2e-2, budget)
    merged = adapted.fold()
    after, folded, plain = count_right(adapted, -1), count_right(merged, -1), count_right(model, 1)
    print(
        f"counts down: {before:.0%} before, {after:.0%} adapted, {folded:.0%} folded; the base counts up: {plain:.0%}"
    )
    assert budget.budget is not None
    print(f"ranks: {budget.budget.live_triplets} triplets at {len(adapted.sites)} weights")
    assert after == folded > max(0.9, before), "the adapters should have learned to count down"
    assert plain > 0.9, "the base model has not changed"
    assert type(merged) is LlamaForCausalLM


if __name__ == "__main__":
    if missing := [name for name in ("transformers", "accelerate") if importlib.util.find_spec(name) is None]:
        print(f"skipped: {missing[0]} is not installed; pip install 'adapter-compiler[integrations]'")
        sys.exit()
    main()
