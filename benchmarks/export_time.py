"""CPU seconds of a verified export beside ``torch.onnx.export`` of the bare model, which checks nothing.

Both export the same model with open batch and sequence, taking turns in one process after one run of each; medians.
Run ``python benchmarks/export_time.py``; ``--rounds`` says how often.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from torch.export import Dim

import adapter_compiler as ac


def make_gpt2() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Two layers of 32."""
    sizes = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config).eval(), {"input_ids": torch.randint(0, 97, (2, 7))}


def make_minilm() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """The shape of MiniLM-L6: 22.7 M parameters."""
    sizes = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
    model = transformers.BertModel(transformers.BertConfig(**sizes)).eval()
    return model, {"input_ids": torch.randint(0, 97, (2, 7)), "attention_mask": torch.ones(2, 7, dtype=torch.long)}


MODELS: dict[str, Callable[[], Any]] = {"GPT-2, 2 layers of 32": make_gpt2, "MiniLM-L6": make_minilm}


def measure(name: str, rounds: int, folder: Path) -> str:
    """A row of the table."""
    torch.manual_seed(0)
    model, example = MODELS[name]()
    adapted = ac.compile_with_adapters(model, example_kwargs=example, config=ac.AdapterConfig(rank=4))
    sizes = {key: {0: Dim.AUTO, 1: Dim.AUTO} for key in example}
    ways: dict[str, Callable[[], Any]] = {
        "torch": lambda: torch.onnx.export(
            model, (), folder / "bare.onnx", kwargs=example, dynamo=True, dynamic_shapes=sizes, verbose=False
        ),
        "merged": lambda: ac.export_onnx(adapted, folder / "merged.onnx", example_kwargs=example),
        "runtime": lambda: ac.export_onnx(adapted, folder / "run.onnx", example_kwargs=example, adapters="runtime"),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(rounds + 1):
        for way, export in ways.items():
            started = time.process_time()
            export()
            if number:
                seconds[way].append(time.process_time() - started)
    bare, *ours = (statistics.median(one) for one in seconds.values())
    return f"| {name} | {bare:.1f} | " + " | ".join(f"{one:.1f} ({one / bare:.2f} ×)" for one in ours) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("| | torch.onnx.export | export_onnx | export_onnx(adapters='runtime') |\n|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for name in MODELS:
            print(measure(name, rounds, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
