"""Quantize the frozen weights under adapters (QLoRA), and report the errors and the memory that it saves.

A weight is quantized if it has an adapter and all its uses are matrix products. All weights are packed first and then
replaced together. The full-precision values leave memory when nothing else refers to them: at once with
``AdapterConfig(inplace=True)``, otherwise when the user deletes the original model.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.reports import QuantizationReport, WeightError
from adapter_compiler.errors import ConfigError
from passes.planning.site import AdapterSite
from passes.quantize.packed_weights import PackedWeight, count_bytes, pack_parameter

logger = logging.getLogger(__name__)


def quantize_base(adapted: AdapterState, kind: str) -> QuantizationReport:
    """Quantize the frozen weights of an adapted model; see :meth:`AdaptedModel.quantize_base`.

    Raises:
        ConfigError: the kind is unknown, the base is quantized already, or no weight can be quantized.
        MissingDependencyError: bitsandbytes is not installed.
    """
    from adapter_compiler.model.quantized.bitsandbytes_weights import find_quantizer

    quantizer = find_quantizer(kind)
    if adapted.quantization_report is not None:
        raise ConfigError(
            f"the base is quantized to {adapted.quantization_report.kind!r} already, expected full-precision weights; "
            "compile the original model again"
        )
    before = _count_model_bytes(adapted.module)
    packed: dict[str, nn.Parameter] = {}
    errors: dict[str, WeightError] = {}
    skipped: dict[str, str] = {}
    for site in _find_sites(adapted):
        parameter = adapted.base_weight(site.weight)
        if reason := _find_reason_against(site, parameter):
            skipped[site.weight] = reason
            continue
        packed[site.weight] = pack_parameter(parameter, quantizer)
        errors[site.weight] = measure_error(parameter.detach(), packed[site.weight])
        _assert_finite(site.weight, kind, errors[site.weight])
    if not errors:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise ConfigError(f"quantize={kind!r}: no adapted weight can be quantized, expected at least one; {reasons}")
    del parameter
    adapted.replace_weights(packed)
    adapted.rebuild(adapted.plan)
    after = _count_model_bytes(adapted.module)
    logger.info("quantized %d weights to %s: %.1f MB, before %.1f MB", len(errors), kind, after / 1e6, before / 1e6)
    return QuantizationReport(kind=kind, errors=errors, skipped=skipped, bytes_before=before, bytes_after=after)


@torch.no_grad()
def measure_error(original: torch.Tensor, packed: torch.Tensor) -> WeightError:
    """How far a packed weight is from the original."""
    assert isinstance(packed, PackedWeight)
    dtype = torch.promote_types(original.dtype, torch.float32)
    difference = packed.unpack().to(dtype) - original.to(dtype)
    norm = float(original.to(dtype).norm())
    largest = float(difference.abs().max()) if difference.numel() else 0.0
    return WeightError(largest=largest, relative=float(difference.norm()) / norm if norm else 0.0)


def _find_sites(adapted: AdapterState) -> list[AdapterSite]:
    """A site for each weight that has adapters."""
    plans = adapted.adapter_set.plans.values()
    return list({adapter.site.weight: adapter.site for plan in plans for adapter in plan}.values())


def _find_reason_against(site: AdapterSite, parameter: nn.Parameter) -> str | None:
    """Why a weight cannot be quantized, or ``None`` if it can."""
    if isinstance(parameter, PackedWeight):
        return "it is quantized already"
    if parameter.requires_grad:
        return "it is trained"
    if parameter.is_meta:
        return "it is on the meta device, which holds no values"
    if site.op != "linear":
        return f"it is used by {site.op}, not only by matrix products"
    if len(site.shape) != 2:
        return f"it has {len(site.shape)} dimensions, expected 2"
    return None


def _assert_finite(name: str, kind: str, error: WeightError) -> None:
    if not math.isfinite(error.largest):
        raise ConfigError(
            f"{name} cannot be quantized to {kind!r}: its unpacked values have inf or nan, expected finite values; the "
            "weight has inf or nan, or exceeds float16; exclude it from the sites"
        )


def _count_model_bytes(module: nn.Module) -> int:
    return sum(count_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
