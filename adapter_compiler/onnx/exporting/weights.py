"""The map from a model's weights to the initializers of a file, which folding by file goes by."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapters.copies import share_unpacked
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.translation.translate import spellings
from adapter_compiler.saving.onnx_files.initializers import InitializerFile
from passes.analysis.weight_uses import find_parameter_aliases

#: Spellings of a name that are looked for.
_SPELLINGS = 3


def map_weights(draft: Path, module: nn.Module) -> dict[str, dict[str, Any]]:
    """For each parameter and buffer, by qualified name, the place in the file.

    Only tensors that are in the file as a whole, in their own layout and with the same bits, are in the map; an
    exporter may have folded others into something else.

    Returns:
        By the weight's first name: ``initializer``, its name in the file, and ``aliases``, its other names.
    """
    file = InitializerFile(draft)
    found: dict[str, dict[str, Any]] = {}
    for name, names, tensor in _named_weights(module):
        spelled = (spelling for alias in names for spelling in itertools.islice(spellings(alias), _SPELLINGS))
        stored = next((candidate for candidate in spelled if _holds(file, candidate, tensor)), None)
        if stored is not None:
            found[name] = {"initializer": stored, "aliases": [other for other in names if other != name]}
    return found


def measure_updates(adapted: AdaptedModel, merged: nn.Module) -> dict[str, float]:
    """‖ΔW‖ of each adapted weight, as the merged model has it; what rounding is compared with when it is quantized."""
    parameters = dict(merged.named_parameters(remove_duplicate=False))
    found = {}
    for name in adapted.plan.by_weight:
        base = share_unpacked(adapted.base_weight(name)).detach().cpu().double()
        if name in parameters and parameters[name].shape == base.shape:
            found[name] = float((parameters[name].detach().cpu().double() - base).norm())
    return found


def _named_weights(module: nn.Module) -> list[tuple[str, list[str], torch.Tensor]]:
    aliases = find_parameter_aliases(module)
    parameters = [
        (name, [alias for alias, first in aliases.items() if first == name], parameter)
        for name, parameter in module.named_parameters()
    ]
    return [*parameters, *((name, [name], buffer) for name, buffer in module.named_buffers())]


def _holds(file: InitializerFile, name: str, tensor: torch.Tensor) -> bool:
    if name not in file or file.shape(name) != tuple(tensor.shape) or file.dtype(name) != tensor.dtype:
        return False
    stored = file.read(name)
    return torch.equal(stored.flatten().view(torch.uint8), tensor.detach().contiguous().flatten().view(torch.uint8))
