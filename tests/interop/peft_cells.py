"""One cell of the table: layers and options go through peft, its folder through us, and the outputs are compared."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from adapter_compiler.saving.folding.fold_files import fold_files


class Experts(nn.Module):
    """A stack of matrices, as experts of transformers: [experts, out, in], or [experts, in, out] if is_transposed."""

    def __init__(self, n: int, m: int, *, is_transposed: bool = False, has_down: bool = False) -> None:
        super().__init__()
        self.is_transposed = is_transposed
        self.up = nn.Parameter(torch.randn(3, *((n, m) if is_transposed else (m, n))) * 0.3)
        if has_down:
            self.down = nn.Parameter(torch.randn(3, n, m) * 0.3)

    def forward(self, x: Tensor) -> Tensor:
        equation = "bi,eio->bo" if self.is_transposed else "bi,eoi->bo"
        y = torch.einsum(equation, x, self.up)
        return torch.einsum(equation, y.tanh(), self.down) if hasattr(self, "down") else y


#: By name: makes a layer with n inputs and m outputs, and an input of it.
LAYERS: dict[str, Callable[[int, int], tuple[nn.Module, Tensor]]] = {
    "linear": lambda n, m: (nn.Linear(n, m), torch.randn(3, n)),
    "linear without bias": lambda n, m: (nn.Linear(n, m, bias=False), torch.randn(3, n)),
    "Conv1D": lambda n, m: (Conv1D(m, n), torch.randn(3, n)),
    "embedding": lambda n, m: (nn.Embedding(n, m), torch.randint(0, n, (5,))),
    "conv1d": lambda n, m: (nn.Conv1d(n, m, 3, padding=1), torch.randn(2, n, 6)),
    "conv2d": lambda n, m: (nn.Conv2d(n, m, 3, padding=1, stride=2), torch.randn(2, n, 5, 5)),
    "conv2d of 1": lambda n, m: (nn.Conv2d(n, m, 1), torch.randn(2, n, 3, 3)),
    "conv3d": lambda n, m: (nn.Conv3d(n, m, 2), torch.randn(2, n, 3, 3, 3)),
    "groups": lambda n, m: (nn.Conv2d(n, m, 3, groups=2), torch.randn(2, n, 4, 4)),
    "attention": lambda n, m: (nn.MultiheadAttention(n, 2, batch_first=True), torch.randn(2, 4, n)),
    "experts": lambda n, m: (Experts(n, m), torch.randn(3, n)),
    "transposed experts": lambda n, m: (Experts(n, m, is_transposed=True), torch.randn(3, n)),
    "two stacks": lambda n, m: (Experts(n, m, has_down=True), torch.randn(3, n)),
}

_STACKS = {"experts": ("up",), "transposed experts": ("up",), "two stacks": ("up", "down")}


class Net(nn.Module):
    """Layers beside each other, a head, and modules in a module."""

    def __init__(self, layers: Sequence[str], n: int, m: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.parts = nn.ModuleDict()
        self.inputs: list[Tensor] = []
        for number, name in enumerate(layers):
            self.parts[f"part{number}"], x = LAYERS[name](n, m)
            self.inputs.append(x)
        self.head = nn.Linear(4, 5, bias=False)
        self.block = nn.Sequential(nn.Linear(5, 3), nn.Tanh(), nn.Linear(3, 2))

    def forward(self, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        head = self.head(torch.ones(1, 4))
        outputs = [head, self.block(head)]
        for part, x in zip(self.parts.values(), self.inputs if inputs is None else inputs, strict=True):
            is_attention = hasattr(part, "in_proj_weight")
            outputs.append(part(x, x, x, need_weights=False)[0] if is_attention else part(x))
        return outputs


@dataclasses.dataclass(frozen=True)
class Folder:
    """What peft wrote: the folder, the base beside it, and the outputs of the model that was saved."""

    path: Path
    base: Path
    outputs: list[Tensor]


def randomize(wrapped: nn.Module) -> None:
    """Give what peft trains random values, as if it were trained."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            is_own = any(part in name for part in ("lora_", "trainable_tokens_delta", "modules_to_save"))
            if is_own:
                parameter.normal_(0, 0.4)
            elif parameter.requires_grad and "ranknum" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def write_with_peft(
    layers: Sequence[str], size: tuple[int, int], options: dict[str, Any], folder: Path
) -> Folder | None:
    """Wrap a net with peft and save it; ``None`` where peft itself does not take the options for these layers."""
    net = Net(layers, *size).eval()
    base = folder / "base.safetensors"
    save_file({name: tensor.clone() for name, tensor in net.state_dict().items()}, base)
    targets = [f"part{number}" for number, name in enumerate(layers) if name not in _STACKS]
    parameters = [f"part{i}.{leaf}" for i, name in enumerate(layers) for leaf in _STACKS.get(name, ())]
    kind = peft.AdaLoraConfig if "init_r" in options else peft.LoraConfig
    rank = {} if "init_r" in options else {"r": 2}
    values = {**rank, "lora_alpha": 3, "target_modules": targets, "target_parameters": parameters or None, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            wrapped: Any = peft.get_peft_model(net, kind(**values)).eval()
            randomize(wrapped)
            outputs = [output.detach() for output in wrapped()]
        except (ValueError, TypeError, RuntimeError, NotImplementedError, KeyError, AttributeError):
            return None
        wrapped.save_pretrained(str(folder / "adapters"))
    return Folder(path=folder / "adapters", base=base, outputs=outputs)


def measure_difference(written: Folder, layers: Sequence[str], size: tuple[int, int], out: Path) -> float:
    """How far the folded model's outputs are from those of peft's model, as a part of the largest."""
    fold_files(written.base, written.path, out)
    folded = Net(layers, *size).eval()
    folded.load_state_dict(load_file(out))
    pairs = zip((output.detach() for output in folded()), written.outputs, strict=True)
    return max(float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1)) for found, wanted in pairs)
