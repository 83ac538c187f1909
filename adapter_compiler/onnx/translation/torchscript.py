"""Trace the model with TorchScript and let torch's old exporter write the file.

It works where torch.export refuses (packed sequences, data-dependent shapes), because it only records what one call
did: branches and Python loops stay as they went for the example. Its file is therefore used only if it is right on
varied inputs, and the tracer's warnings become part of the report.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import nn

from adapter_compiler.errors import ExportError
from adapter_compiler.onnx.translation.opsets import NEWEST_TRACED_OPSET
from adapter_compiler.onnx.translation.translate import clean_up, find_kept_weights, innermost, quiet_exporter
from adapter_compiler.onnx.verification.sizes import Place
from passes.capture.calls import ModuleCall
from passes.capture.capture import DimensionBound


class _TracedCall(nn.Module):
    """Takes the tensors of a call one by one, as the old exporter requires."""

    def __init__(self, module: nn.Module, call: ModuleCall) -> None:
        super().__init__()
        self.module = module
        self.call = call
        self.training = module.training

    def forward(self, *tensors: torch.Tensor) -> Any:
        args, kwargs = self.call.rebuild(tensors)
        return self.module(*args, **kwargs)


def guess_bounds(call: ModuleCall, groups: Sequence[Collection[Place]]) -> tuple[tuple[DimensionBound, ...], ...]:
    """Sizes that the file may be valid for, since a trace does not know: any size of the dimensions in ``groups``.

    Verification shows whether that is right.
    """
    symbols = {place: f"size_{number}" for number, group in enumerate(groups) for place in group}
    return tuple(
        tuple(_guess_bound(size, symbols.get(Place(i, dimension))) for dimension, size in enumerate(tensor.shape))
        for i, tensor in enumerate(call.tensors)
    )


def _guess_bound(size: int, symbol: str | None) -> DimensionBound:
    if symbol is None or size < 2:
        return DimensionBound(symbol=None, least=size, greatest=size)
    return DimensionBound(symbol=symbol, least=2, greatest=float("inf"))


def trace_to_file(
    module: nn.Module,
    call: ModuleCall,
    draft: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    bounds: Sequence[Sequence[DimensionBound]],
    *,
    opset: int | None,
) -> tuple[str, ...]:
    """Trace ``module`` on ``call`` and write the file; the tracer's warnings about values that became constants.

    Raises:
        ExportError: the model does not trace, an operator has no translation, or the opset is too new.
    """
    if opset is not None and opset > NEWEST_TRACED_OPSET:
        raise ExportError(f"the TorchScript exporter writes opset {NEWEST_TRACED_OPSET} at most, requested was {opset}")
    axes = {
        name: {i: f"{bound.symbol}" for i, bound in enumerate(tensor) if bound.symbol is not None}
        for name, tensor in zip(inputs, bounds, strict=True)
    }
    with quiet_exporter(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.onnx.export(
                _TracedCall(module, call),
                call.tensors,
                draft,
                dynamo=False,
                do_constant_folding=False,
                input_names=list(inputs),
                output_names=list(outputs),
                dynamic_axes={name: open_axes for name, open_axes in axes.items() if open_axes},
                opset_version=opset or NEWEST_TRACED_OPSET,
            )
        except Exception as error:  # the tracer passes on any exception of the model's own code
            raise ExportError(f"the TorchScript exporter fails: {innermost(error)}") from error
        model = onnx_ir.load(draft)
        clean_up(model, [f"module.{name}" for name in find_kept_weights(module)])
        onnx_ir.save(model, draft)
    return tuple(_find_frozen(caught))


def _find_frozen(caught: Sequence[warnings.WarningMessage]) -> list[str]:
    """Each warning of the tracer once, with the line of the model's code that caused it."""
    found = [
        f"{Path(w.filename).name}:{w.lineno}: {re.split(r'[.] ', ' '.join(str(w.message).split()))[0]}"
        for w in caught
        if w.category.__name__ == "TracerWarning"
    ]
    return list(dict.fromkeys(found))
