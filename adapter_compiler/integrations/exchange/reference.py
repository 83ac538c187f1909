"""Inputs and outputs of an adapted model, beside an exchanged adapter, for whoever runs it elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from adapter_compiler.errors import ConfigError
from adapter_compiler.onnx.translation.exportable import prepare_call
from adapter_compiler.onnx.verification.inputs import spell_names
from adapter_compiler.saving.exchange.manifest import find_reference
from adapter_compiler.saving.primitives.files import written_beside
from adapter_compiler.saving.primitives.safetensors_header import read_safetensors

_INPUT, _OUTPUT = "input.", "output."


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reference:
    """One call.

    Attributes:
        inputs: keyword arguments.
        outputs: by the names of what the model returns.
    """

    inputs: Mapping[str, torch.Tensor]
    outputs: Mapping[str, torch.Tensor]


def write_reference(
    adapter: str | Path,
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
) -> Path:
    """Run a model with its adapters, and write inputs and outputs beside an exchanged adapter.

    Args:
        adapter: what ``convert_adapters`` wrote.
        model: an adapted model, or one that the adapters are merged into; it is not changed.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.

    Returns:
        The safetensors file.

    Raises:
        ConfigError: an argument is no tensor, or has no name in the model's ``forward``.
    """
    with torch.no_grad():
        exporter, call = prepare_call(model, example_args, example_kwargs, merged=True)
        named = exporter.named_outputs(call)
    inputs = dict(zip(spell_names(call.names), call.tensors, strict=True))
    args, kwargs = call.rebuild(call.tensors)
    if args or any(not isinstance(value, torch.Tensor) for value in kwargs.values() if value is not None):
        raise ConfigError(
            f"the reference call of {type(model).__name__} has arguments that are no tensors or have no names, "
            "expected named tensors; give an example of keyword arguments"
        )
    tensors = {f"{_INPUT}{name}": tensor for name, tensor in inputs.items()}
    tensors |= {f"{_OUTPUT}{name.removeprefix(_OUTPUT)}": tensor for name, tensor in named}
    path = find_reference(Path(adapter))
    with written_beside(path) as draft:
        save_file({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}, draft)
    return path


def read_reference(adapter: Path) -> Reference | None:
    """The reference call beside an adapter; ``None`` if there is none.

    Raises:
        CheckpointError: the file is damaged.
    """
    path = find_reference(adapter)
    if not path.exists():
        return None
    file = read_safetensors(path)
    values = {name: file.read(name) for name in file.tensors}

    def having(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in values.items() if name.startswith(prefix)}

    return Reference(inputs=having(_INPUT), outputs=having(_OUTPUT))
