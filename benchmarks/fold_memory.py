"""Peak memory and seconds of folding adapters into a large checkpoint: streaming, and through PyTorch.

    ./run python benchmarks/fold_memory.py
    ./run python benchmarks/fold_memory.py --layers 8 --width 1024

Makes a synthetic checkpoint (by default 2.6 GB: 40 square weights of 4096 in float32) and adapters for all of it,
folds it in a process of its own for each way, checks that both results are the same file bit for bit, and
measures the highest resident memory of each process. PEFT's merge_and_unload runs on the same adapters.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RANK = 8


def make_files(folder: Path, layers: int, width: int) -> None:
    """A checkpoint, PEFT adapters for it, both written piece by piece."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    header, end = {}, 0
    for layer in range(layers):
        size = width * width * 4
        header[f"{layer}.weight"] = {"dtype": "F32", "shape": [width, width], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with (folder / "base.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in range(layers):
            file.write(torch.randn(width, width).numpy().tobytes())
    adapters = folder / "adapters"
    adapters.mkdir()
    tensors = {}
    for layer in range(layers):
        tensors[f"base_model.model.{layer}.lora_A.weight"] = torch.randn(RANK, width) / 10
        tensors[f"base_model.model.{layer}.lora_B.weight"] = torch.randn(width, RANK) / 10
    save_file(tensors, adapters / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": r"\d+", "bias": "none"}
    (adapters / "adapter_config.json").write_text(json.dumps(config))


def fold_streaming(folder: Path) -> None:
    from adapter_compiler.saving.folding.fold_files import fold_files

    fold_files(folder / "base.safetensors", folder / "adapters", folder / "streaming.safetensors")


def load_model(folder: Path) -> Any:
    from safetensors.torch import load_file
    from torch import nn

    state = load_file(folder / "base.safetensors")
    width = state["0.weight"].shape[0]
    import torch

    with torch.device("meta"):
        model = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in state))
    model.load_state_dict(state, assign=True)
    return model


def fold_through_pytorch(folder: Path) -> None:
    """The whole model in memory; each weight merged in place by the same function, then saved."""
    import torch
    from safetensors.torch import save_file

    from adapter_compiler.saving.folders.read_folder import read_saved_adapters

    model, saved = load_model(folder), read_saved_adapters(folder / "adapters")
    with torch.no_grad():
        for site in saved.adapters:
            weight = model.get_parameter(site)
            weight.copy_(saved.merge(site, weight))
    save_file(dict(model.state_dict()), folder / "pytorch.safetensors")


def fold_through_peft(folder: Path) -> None:
    import peft
    from safetensors.torch import save_file

    wrapped = peft.PeftModel.from_pretrained(load_model(folder), folder / "adapters")
    save_file(dict(wrapped.merge_and_unload().state_dict()), folder / "peft.safetensors")


WAYS = {"nothing": None, "streaming": fold_streaming, "pytorch": fold_through_pytorch, "peft": fold_through_peft}


def measure(way: str, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of one way, in this process."""
    import torch

    import adapter_compiler  # noqa: F401 - so that every way starts from the same memory

    torch.set_num_threads(1)
    started = time.perf_counter()
    run = WAYS[way]
    if run is not None:
        run(folder)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"way": way, "seconds": round(time.perf_counter() - started, 1), "peak": peak}


def hash_data(path: Path) -> str:
    """Hash of the tensors by name, whatever their order in the file."""
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for name in sorted(file.keys()):
            digest.update(name.encode() + file.get_tensor(name).numpy().tobytes())
    return digest.hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=40)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--folder", type=Path, help="where to make the files; default: a temporary folder")
    parser.add_argument("--measure", choices=list(WAYS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.folder)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        make_files(folder, options.layers, options.width)
        size = (folder / "base.safetensors").stat().st_size
        print(f"checkpoint of {size / 1e9:.2f} GB, largest weight {options.width**2 * 4 / 1e6:.0f} MB")
        for way in WAYS:
            command = [sys.executable, "-W", "ignore", __file__, "--measure", way, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            row = json.loads(done.stdout.splitlines()[-1])
            share = row["peak"] / size
            print(f"{way:10} {row['seconds']:6.1f} s, peak {row['peak'] / 1e9:.2f} GB = {share:.2f} × the checkpoint")
        same = hash_data(folder / "streaming.safetensors") == hash_data(folder / "pytorch.safetensors")
        print(f"streaming equals PyTorch bit for bit: {same}")
        if not same:
            raise SystemExit(1)


if __name__ == "__main__":
    main()
