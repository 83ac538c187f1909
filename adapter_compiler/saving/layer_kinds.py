"""Kinds of modules, as far as PEFT writes their adapters in different ways."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

#: ``nn.Linear`` and transformers' ``Conv1D``.
LINEAR = "linear"

#: The same, but it is not known which of the two, so that the layout of the weight is not known either.
LINEAR_OR_CONV1D = "linear or Conv1D"

EMBEDDING = "embedding"

#: Convolutions by the dimensions of their kernels; only those that PEFT's two convolutions in a row can express.
CONVOLUTIONS: Mapping[int, str] = {3: "Conv1d", 4: "Conv2d", 5: "Conv3d"}

#: ``in_proj_weight`` or ``out_proj.weight`` of an ``nn.MultiheadAttention``.
ATTENTION = "nn.MultiheadAttention"

#: A parameter that is no ``weight`` of a module of these kinds.
PARAMETER = "parameter"


def find_layer_kind(model: nn.Module, weight: str) -> str:
    """The kind of the module that a weight belongs to; for a kind that is not listed here the name of its class."""
    path, _, leaf = weight.rpartition(".")
    owner = model.get_submodule(path)
    parent = model.get_submodule(path.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention) or isinstance(parent, nn.MultiheadAttention):
        return ATTENTION
    if leaf != "weight":
        return PARAMETER
    if isinstance(owner, nn.Embedding):
        return EMBEDDING
    if isinstance(owner, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return _find_convolution(owner)
    is_linear = isinstance(owner, nn.Linear) or any(cls.__name__ == "Conv1D" for cls in type(owner).__mro__)
    return LINEAR if is_linear else type(owner).__name__


def _find_convolution(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d) -> str:
    """PEFT's first convolution has the layer's kernel, stride and padding, but no groups and no dilation."""
    kind = CONVOLUTIONS[layer.weight.dim()]
    if layer.groups > 1:
        return f"{kind} with {layer.groups} groups"
    if any(step > 1 for step in layer.dilation):
        return f"{kind} with dilation {layer.dilation}"
    return kind if layer.padding_mode == "zeros" else f"{kind} with padding_mode {layer.padding_mode!r}"
