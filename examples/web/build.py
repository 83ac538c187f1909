"""A page that classifies drawn digits in the browser and switches adapters by a click.

    python examples/web/build.py --out page

A network learns scikit-learn's digits. Two adapters are trained for it: one for digits that are turned by 90°, one for
digits in negative. The page gets one file of the base model and both adapters, and runs them with onnxruntime-web,
which comes from npm:

    npm install --prefix examples/web               before the command above
    python -m http.server --directory page          after it
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac
from adapter_compiler.onnx.serving.web_files import write_web_files

HERE = Path(__file__).parent
RUN_TIME = HERE / "node_modules" / "onnxruntime-web" / "dist"
#: What of onnxruntime-web a page needs that computes on the CPU.
PARTS = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = ("index.html", "page.js")
#: What each adapter is for: how its images [N, 1, 8, 8] differ from those of the base.
TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda images: images.rot90(1, (2, 3)),
    "negative": lambda images: 1 - images,
}


def make_model() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 64), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(64, 10))


def train(model: nn.Module, parameters: list[nn.Parameter], images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=2e-3)
    for _ in range(steps):
        rows = torch.randint(len(images), (64,))
        shifted = images[rows].roll(tuple(torch.randint(-1, 2, (2,)).tolist()), (2, 3))
        nn.functional.cross_entropy(model(shifted), labels[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("page"), help="the folder of the page")
    parser.add_argument("--steps", type=int, default=600, help="training steps, for the base and for each adapter")
    parser.add_argument("--run-time", type=Path, default=RUN_TIME, help="the folder dist of onnxruntime-web")
    options = parser.parse_args()
    if missing := [name for name in PARTS if not (options.run_time / name).is_file()]:
        parser.error(f"{options.run_time} has no {missing[0]}; run `npm install --prefix examples/web`")

    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    held_out, held_labels = images[1500:], labels[1500:]
    images, labels = images[:1500], labels[:1500]

    model = make_model()
    train(model, list(model.parameters()), images, labels, options.steps)
    config = ac.AdapterConfig(rank=8, sites="auto")
    adapted = ac.compile_with_adapters(model.eval(), (images[:2],), config=config)
    with tempfile.TemporaryDirectory() as folder:
        base, files = Path(folder) / "base.onnx", {}
        report = ac.export_onnx(adapted, base, (images[:2],), adapters="runtime")
        print(f"one file for all: verified on {len(report.cases)} inputs, largest error {report.max_abs_error:.1e}")
        samples, expected = {"base": held_out[:12]}, {"base": model(held_out[:12])}
        for name, change in TASKS.items():
            if name not in adapted.adapter_names:
                adapted.add_adapter(name)
            adapted.use(name)
            before = accuracy(model, change(held_out), held_labels)
            train(adapted.train(), list(adapted.trainable_parameters()), change(images), labels, options.steps)
            adapted.eval()
            after = accuracy(adapted, change(held_out), held_labels)
            print(f"{name}: {before:.1%} of held-out digits without the adapter, {after:.1%} with it")
            files[name] = Path(folder) / f"{name}.onnx_adapter"
            ac.save_onnx_adapter(adapted, files[name])
            samples[name] = change(held_out[:12])
            expected[name] = adapted.fold().eval()(samples[name])
        write_web_files(base, files, options.out)
    write_samples(options.out, samples, expected, held_labels[:12])
    for source in [*(HERE / name for name in PAGE), *(options.run_time / name for name in PARTS)]:
        shutil.copyfile(source, options.out / source.name)
    print(f"wrote {options.out}; `python -m http.server --directory {options.out}` shows it")


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(-1) == labels).double().mean())


def write_samples(folder: Path, samples: dict[str, Tensor], expected: dict[str, Tensor], labels: Tensor) -> None:
    """Held-out images to click at, and PyTorch's logits for them, which the page compares its own with."""
    entries = {
        name: {"images": images.flatten(1).tolist(), "logits": expected[name].tolist(), "labels": labels.tolist()}
        for name, images in samples.items()
    }
    (folder / "samples.json").write_text(json.dumps(entries), encoding="utf-8")


if __name__ == "__main__":
    main()
