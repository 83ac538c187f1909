"""A small model with everything that training changes, served by the tests of this folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import adapter_compiler as ac

Array = np.ndarray[tuple[int, ...], np.dtype[np.float32]]

INPUTS, OUTPUTS = 6, 3


class Classifier(nn.Module):
    """Two adapted layers, a norm with running statistics, a head that trains fully, and a constant table."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm, self.down = nn.Linear(INPUTS, 8), nn.BatchNorm1d(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, OUTPUTS)
        self.register_buffer("table", torch.randn(8), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.down(self.norm(self.up(x)).relu() * self.table)
        return {"logits": self.head(hidden)}


def draw_inputs(rows: int = 4) -> Tensor:
    return torch.randn(rows, INPUTS)


def adapt(model: nn.Module, *, rank: int = 2, seed: int | None = None, train: bool = False) -> ac.AdaptedModel:
    """A copy of the model with adapters and a head of ``seed``'s values, and moved statistics if it is to train."""
    config = ac.AdapterConfig(rank=rank, alpha=rank, sites=("up", "down"), trainable=("head.*",))
    adapted = ac.compile_with_adapters(model.eval(), (draw_inputs(),), config=config)
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapted.trainable_parameters():
                parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    if train:
        adapted.train()
        with torch.no_grad():
            for _ in range(5):
                adapted(3 * draw_inputs(16) + 1)
        adapted.eval()
    return adapted


def call(served: ac.OnnxAdapters, x: Tensor, adapter: str | None = None) -> Array:
    found: Array = served.run({"x": x.numpy()}, adapter=adapter)["logits"]
    return found


def expect(adapted: ac.AdaptedModel, x: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = adapted.fold().eval()(x)["logits"]
    return logits


@dataclasses.dataclass(frozen=True)
class Served:
    """A base file, and adapters of the same base.

    Attributes:
        folder: where the files are: ``base.onnx``, ``one.onnx_adapter`` and ``two.onnx_adapter``.
        model: the base model.
        adapted: the adapted models by the names of their files.
    """

    folder: Path
    model: nn.Module
    adapted: dict[str, ac.AdaptedModel]

    @property
    def base(self) -> Path:
        return self.folder / "base.onnx"

    def file(self, name: str) -> Path:
        return self.folder / f"{name}.onnx_adapter"

    def open(self) -> ac.OnnxAdapters:
        return ac.OnnxAdapters(self.base)


def write_files(folder: Path) -> Served:
    torch.manual_seed(0)
    model = Classifier().eval()
    ac.export_onnx(adapt(model), folder / "base.onnx", (draw_inputs(),), adapters="runtime")
    adapted = {"one": adapt(model, seed=1, train=True), "two": adapt(model, rank=4, seed=2)}
    served = Served(folder, model, adapted)
    for name, one in adapted.items():
        ac.save_onnx_adapter(one, served.file(name))
    return served
