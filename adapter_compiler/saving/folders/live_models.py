"""Saved adapters and a model in memory: what it says of its weights, and whether PEFT's adapters can act in it."""

from __future__ import annotations

import dataclasses
import logging

import torch
from torch import nn

from adapter_compiler.errors import CheckpointError
from adapter_compiler.saving.folders.base_weights import BaseWeights
from adapter_compiler.saving.folders.saved_adapters import SavedAdapters
from adapter_compiler.saving.quantized_formats import find_formats
from passes.analysis.weight_uses import find_parameter_aliases
from passes.quantize.packed_weights import read_parameter

logger = logging.getLogger(__name__)


def fit_to_model(saved: SavedAdapters, model: nn.Module) -> SavedAdapters:
    """The adapters as this model needs them.

    Raises:
        CheckpointError: the adapters belong to another model; or they are PEFT's and change one name of a tied weight,
            where adapters of this library change the weight.
    """
    fitted = _drop_equal_starts(saved.fit(describe_model(model)), model)
    if fitted.kind.startswith("peft"):
        _assert_untied(fitted, find_parameter_aliases(model))
    formats = find_formats(model)
    if odd := sorted(name for name, one in fitted.quantized.items() if formats.get(name) != one):
        logger.warning(
            "%s: the adapters were trained over %d quantized weights (%s: %s), which this model has in another format; "
            "the same updates give another model",
            fitted.path,
            len(odd),
            odd[0],
            fitted.quantized[odd[0]].name,
        )
    return fitted


def _drop_equal_starts(saved: SavedAdapters, model: nn.Module) -> SavedAdapters:
    """Leave out the base values that PEFT saves of adapted embeddings, where this model has the same."""
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)} & saved.starts.keys()
    weights = {name: read_parameter(model, name).detach().cpu() for name in names}
    starts = {
        name: key
        for name, key in saved.starts.items()
        if name not in weights or not torch.equal(weights[name], saved.tensor(key).to(weights[name].dtype))
    }
    return dataclasses.replace(saved, starts=starts)


def describe_model(model: nn.Module) -> BaseWeights:
    """What a model says of its weights."""
    shapes: dict[str, tuple[int, ...]] = {}
    transposed: dict[str, bool] = {}
    order: dict[str, tuple[str, ...]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        parameters = {name: p for name, p in module._parameters.items() if p is not None}
        buffers = {name: b for name, b in module._buffers.items() if b is not None}
        shapes |= {prefix + name: tuple(tensor.shape) for name, tensor in (parameters | buffers).items()}
        order[path] = tuple(parameters)
        if isinstance(module, (nn.Linear, nn.Embedding)):
            transposed[f"{prefix}weight"] = False
        elif any(cls.__name__ == "Conv1D" for cls in type(module).__mro__):
            transposed[f"{prefix}weight"] = True
        is_transposed = bool(getattr(module, "is_transposed", False))
        transposed |= {prefix + name: is_transposed for name, p in parameters.items() if p.dim() == 3}
    return BaseWeights(name="this model", shapes=shapes, transposed=transposed, parameters=order)


def _assert_untied(saved: SavedAdapters, aliases: dict[str, str]) -> None:
    names = [name for name in aliases if name in saved.changed or name in saved.replacements]
    for name in names:
        others = [other for other, first in aliases.items() if first == aliases[name] and other != name]
        if name in saved.keeps_ties or all(saved.changes_alike(name, other) for other in others):
            continue
        raise CheckpointError(
            f"{saved.path}: {name} and {others[0]} are tied in this model, and PEFT's adapters change {name} alone; "
            "expected weights of their own; compile with untie=, or fold the adapters into the model's folder"
        )
