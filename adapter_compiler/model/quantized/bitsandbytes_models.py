"""Models whose linear layers bitsandbytes has quantized already, as transformers loads them.

    Linear4bit (NF4, FP4)   →   nn.Linear whose weight is packed in the same codes
    Linear8bitLt            →   nn.Linear whose weight is packed in the same int8 rows

The codes are shared, nothing is quantized anew. The layers then capture, carry adapters and fold; folding gives
nn.Linear in full precision. Products run in the dtype of the unpacked weight with unquantized activations, so an
8-bit layer differs from its own forward by the rounding of its activations. Other layers stay as they are.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from adapter_compiler.errors import ConfigError
from adapter_compiler.model.quantized.bitsandbytes_weights import Int8Values, Nf4Values
from passes.capture.module_state import HOOK_KINDS
from passes.quantize.packed_weights import PackedValues, PackedWeight, as_parameter

logger = logging.getLogger(__name__)

_MODULES = "bitsandbytes.nn.modules"
_NOTES = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def has_bitsandbytes_linears(model: nn.Module) -> bool:
    """Whether a layer of the model is one of bitsandbytes' linear layers, told without importing it."""
    return any(_find_kind(module) is not None for module in model.modules())


def adopt_bitsandbytes_linears(own: nn.Module, model: nn.Module) -> None:
    """Replace such layers of ``own`` by linear layers with packed weights.

    Args:
        own: a copy of ``model``, or ``model`` itself; edited in place.
        model: whose layers hold the codes.

    Raises:
        ConfigError: a layer is not quantized yet, or it is the model itself.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers = [(name, module) for name, module in model.named_modules() if _find_kind(module) is not None]
    for name, layer in layers:
        if not name:
            raise ConfigError(
                f"the model is a {type(layer).__name__} itself, expected one that holds it; wrap it in nn.Sequential"
            )
        mine = own.get_submodule(name)
        replacement = _make_linear(layer, mine, _read_values(name, layer, dtype))
        for path, child in list(own.named_modules(remove_duplicate=False)):
            if child is mine:
                owner, _, leaf = path.rpartition(".")
                own.get_submodule(owner)._modules[leaf] = replacement
    _forget_quantization(own)
    logger.info("%d layers of bitsandbytes run as linear layers over the same codes", len(layers))


def _forget_quantization(own: nn.Module) -> None:
    """Take away transformers' notes on how the model was loaded, which would be wrong once it is folded and saved."""
    for module in own.modules():
        for note in _NOTES:
            module.__dict__.pop(note, None)
        config: Any = module.__dict__.get("config")
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def _find_kind(module: nn.Module) -> str | None:
    kinds = [cls.__name__ for cls in type(module).__mro__ if cls.__module__ == _MODULES]
    return next((kind for kind in kinds if kind in ("Linear4bit", "Linear8bitLt")), None)


def _read_values(name: str, layer: Any, dtype: torch.dtype) -> PackedValues:
    weight = layer.weight
    if _find_kind(layer) == "Linear4bit":
        state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
        if state is not None:
            return Nf4Values(weight.data, state)
    else:
        # The first call moves the codes from the weight to the layer's state.
        codes = layer.state.CB if weight.CB is None else weight.CB
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        if codes is not None and scales is not None:
            return Int8Values(codes, scales, dtype)
    raise ConfigError(
        f"layer {name} is a {type(layer).__name__} whose weight is {weight.dtype}, expected quantized "
        "codes; move the model to its device first, which quantizes it"
    )


def _make_linear(layer: Any, mine: Any, values: PackedValues) -> nn.Linear:
    """A linear layer over these values with the bias, mode and hooks of ``mine``."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = as_parameter(PackedWeight(values), {})
    made.bias = mine.bias
    made.training = mine.training
    for kind in HOOK_KINDS:
        made.__dict__[kind] = mine.__dict__[kind]
    return made
