"""Models whose linear layers are already quantized by bitsandbytes, as transformers loads them.

    Linear4bit (NF4, FP4)   →   nn.Linear whose weight is packed in the same codes
    Linear8bitLt            →   nn.Linear whose weight is packed in the same int8 rows

The codes are shared; nothing is quantized again. The new layers can be captured, adapted and folded; folding gives
nn.Linear in full precision. Products run in the dtype of the unpacked weight and do not quantize activations, so an
8-bit layer differs from bitsandbytes' forward by the rounding of activations. Other layers do not change.
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
#: Attributes in which transformers records how a model was quantized.
_RECORDS = ("hf_quantizer", "quantization_method", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit")


def has_bitsandbytes_linears(model: nn.Module) -> bool:
    """Whether the model has one of bitsandbytes' linear layers; does not import bitsandbytes."""
    return any(_find_kind(module) is not None for module in model.modules())


def adopt_bitsandbytes_linears(own: nn.Module, model: nn.Module) -> None:
    """Replace bitsandbytes' linear layers by ``nn.Linear`` with packed weights.

    Args:
        own: a copy of ``model``, or ``model`` itself; its layers are replaced in place.
        model: the model whose layers have the codes.

    Raises:
        ConfigError: a layer is not quantized yet, or the model itself is such a layer.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    layers = [(name, module) for name, module in model.named_modules() if _find_kind(module) is not None]
    for name, layer in layers:
        if not name:
            raise ConfigError(
                f"the model itself is a {type(layer).__name__}, expected a module that contains it; wrap it in "
                "nn.Sequential"
            )
        copied = own.get_submodule(name)
        replacement = _make_linear(layer, copied, _read_values(name, layer, dtype))
        for path, child in list(own.named_modules(remove_duplicate=False)):
            if child is copied:
                owner, _, leaf = path.rpartition(".")
                own.get_submodule(owner)._modules[leaf] = replacement
    _remove_quantization_records(own)
    logger.info("%d layers of bitsandbytes run as nn.Linear with the same codes", len(layers))


def _remove_quantization_records(own: nn.Module) -> None:
    """Remove what transformers recorded about quantization, because it is wrong once the model is folded and saved."""
    for module in own.modules():
        for record in _RECORDS:
            module.__dict__.pop(record, None)
        config: Any = module.__dict__.get("config")
        if getattr(config, "quantization_config", None) is not None:
            del config.quantization_config


def _find_kind(module: nn.Module) -> str | None:
    kinds = [cls.__name__ for cls in type(module).__mro__ if cls.__module__ == _MODULES]
    return next((kind for kind in kinds if kind in ("Linear4bit", "Linear8bitLt")), None)


def _read_values(name: str, layer: Any, dtype: torch.dtype) -> PackedValues:
    """The codes of a layer.

    Raises:
        ConfigError: the layer is not quantized yet.
    """
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


def _make_linear(layer: Any, copied: Any, values: PackedValues) -> nn.Linear:
    """A linear layer with these packed values, and with the bias, mode and hooks of ``copied``."""
    made = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
    made.weight = as_parameter(PackedWeight(values), {})
    made.bias = copied.bias
    made.training = copied.training
    for kind in HOOK_KINDS:
        made.__dict__[kind] = copied.__dict__[kind]
    return made
