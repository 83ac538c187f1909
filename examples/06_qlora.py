"""Train two adapters over one base model in four bits (QLoRA), and see how much memory that takes.

    python examples/06_qlora.py

A network that reads scikit-learn's digits is adapted to two changes of its input: rotated and mirrored images. The
frozen weights are kept in full precision, in int8 and in NF4 in turn. The table shows the memory of the model at rest,
what of its weights a training step keeps for backward on top (nothing: backward unpacks them again), how far the
folded weights are from the exact ones, and the accuracy on each task, of the base and with the task's adapter.
Needs ``pip install 'adapter-compiler[qlora,demo]'``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn

import adapter_compiler as ac

STEPS, WIDTH = 150, 512
TASKS = {
    "rotated": lambda x: x.view(-1, 8, 8).rot90(1, (1, 2)).flatten(1),
    "mirrored": lambda x: x.view(-1, 8, 8).flip(2).flatten(1),
}


def train(model: nn.Module, parameters: list[nn.Parameter], x: Tensor, y: Tensor, *, lr: float) -> None:
    optimizer = torch.optim.AdamW(parameters, lr=lr)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (128,))
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def measure_accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    return float((model(x).argmax(1) == y).float().mean())


def make_base(x: Tensor, y: Tensor) -> nn.Module:
    """A trained network; the layers between its first and its last hold nearly all of its weights."""
    layers = [nn.Linear(64, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU()]
    base = nn.Sequential(*layers, nn.Linear(WIDTH, 10))
    train(base, list(base.parameters()), x, y, lr=1e-3)
    return base


def count_kept_for_backward(adapted: ac.AdaptedModel, x: Tensor) -> int:
    """Bytes of unpacked weights that one forward keeps beside the model's own tensors."""
    shapes = {tuple(site.shape) for site in adapted.sites}
    own = {tensor.data_ptr() for tensor in (*adapted.parameters(), *adapted.buffers())}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        is_weight = tuple(tensor.shape) in shapes or tuple(tensor.t().shape if tensor.dim() == 2 else ()) in shapes
        if is_weight and tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        adapted(x)
    return sum(kept.values())


def adapt(base: nn.Module, kind: str | None, x: Tensor, y: Tensor) -> ac.AdaptedModel:
    """The base in this precision with a trained adapter for each task."""
    config = ac.AdapterConfig(rank=4, alpha=8, quantize=kind)
    adapted = ac.compile_with_adapters(base, (x[:2],), config=config)
    for name, change in TASKS.items():
        adapted.add_adapter(name)
        adapted.use(name)
        train(adapted, adapted.trainable_parameters(), change(x), y, lr=5e-3)
    adapted.remove_adapter("default")
    return adapted


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    base = make_base(x, y)
    headings = ("weights in", "model at rest", "kept for backward", "error of folded weights", *TASKS)
    table = Table(*headings, title=f"{sum(p.numel() for p in base.parameters()):,} values, two adapters of rank 4")
    sizes = {}
    for kind in (None, "int8", "nf4"):
        adapted = adapt(base, kind, x, y)
        sizes[kind] = adapted.report().model_bytes
        kept = count_kept_for_backward(adapted, x[:32])
        assert kept == 0, f"{kept} bytes of weights are kept for backward"
        adapted.fold()
        assert adapted.fold_report is not None
        errors = [error.relative for error in adapted.fold_report.quantization_error.values()] or [0.0]
        cells = []
        for name, change in TASKS.items():
            adapted.use(name)
            before, after = (measure_accuracy(model, change(x), y) for model in (base, adapted))
            assert measure_accuracy(adapted.fold(), change(x), y) == after > before + 0.2
            cells.append(f"{before:.1%} → {after:.1%}")
        table.add_row(kind or "float32", f"{sizes[kind] / 1e6:.2f} MB", f"{kept} bytes", f"{max(errors):.1%}", *cells)
    Console().print(table)
    Console().print(
        f"NF4 takes {sizes[None] / sizes['nf4']:.1f} times less memory than float32, for both tasks together"
    )
    assert sizes[None] > 6 * sizes["nf4"]


if __name__ == "__main__":
    main()
