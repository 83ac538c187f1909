"""int8 and 4-bit weights, by onnxruntime's quantizers."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import onnx
import torch
from onnx import numpy_helper

from adapter_compiler.onnx.quantization.prepare import Prepared, restore_defaults
from adapter_compiler.saving.onnx_files.large_weights import is_large, save_model

#: Weights that share a scale in 4-bit files.
BLOCK_SIZE = 32
#: Batches that ranges of activations are read from.
CALIBRATION_BATCHES = 16


def write_dynamic(prepared: Prepared, target: Path) -> None:
    """Weights in int8 with a scale for each output feature; activations are quantized as they come."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    # Seven bits: with eight, processors without VNNI add pairs of products in 16 bits, which saturate.
    quantize_dynamic(
        prepared.with_inputs,
        target,
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        nodes_to_exclude=list(prepared.kept),
        use_external_data_format=is_large(prepared.with_inputs),
    )
    _restore(target, prepared)


def write_static(prepared: Prepared, target: Path, batches: Sequence[dict[str, torch.Tensor]], method: str) -> None:
    """Weights and activations in int8 with Q/DQ nodes, where a constant weight is multiplied or convolved.

    Args:
        prepared: the float file.
        target: the file to write.
        batches: inputs from which the ranges of activations are read.
        method: ``"MinMax"`` or ``"Percentile"``, which leaves out the 0.001 % farthest values.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    defaults = {tensor.name: numpy_helper.to_array(tensor) for _, tensor in prepared.opened}
    with warnings.catch_warnings(), _without_prints():
        warnings.simplefilter("ignore")  # of values that there are none of, such as those of adapters of rank 0
        quantize_static(
            prepared.with_inputs,
            target,
            _make_reader(batches, defaults),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=["MatMul", "Conv", "ConvTranspose"],
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=list(prepared.kept),
            calibrate_method=CalibrationMethod[method],
            use_external_data_format=is_large(prepared.with_inputs),
            extra_options={"MatMulConstBOnly": True},
        )
    _restore(target, prepared)


def write_4bit(prepared: Prepared, target: Path) -> None:
    """Weights of products in 4 bits, 32 of a row together; activations stay in float."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    quantizer = MatMulNBitsQuantizer(
        onnx.load(prepared.with_inputs),
        block_size=BLOCK_SIZE,
        is_symmetric=False,
        nodes_to_exclude=list(prepared.kept),
    )
    quantizer.process()
    save_model(quantizer.model.model, target)
    _restore(target, prepared)


def find_equal(batches: Sequence[dict[str, torch.Tensor]]) -> list[dict[str, torch.Tensor]]:
    """The batches of the most frequent sizes; onnxruntime's histograms need equal ones."""
    sizes = [tuple((name, tensor.shape) for name, tensor in batch.items()) for batch in batches]
    most = max(sizes, key=sizes.count, default=())
    return [batch for batch, size in zip(batches, sizes, strict=True) if size == most]


@contextlib.contextmanager
def _without_prints() -> Iterator[None]:
    """Inside, onnxruntime's calibration does not print; other threads' output goes where it went."""
    from onnxruntime.quantization import calibrate

    calibrate.print = lambda *_, **__: None
    try:
        yield
    finally:
        vars(calibrate).pop("print", None)  # another thread may have done so


def _restore(target: Path, prepared: Prepared) -> None:
    model = onnx.load(target)
    restore_defaults(model, prepared)
    save_model(model, target)


def _make_reader(batches: Sequence[dict[str, torch.Tensor]], defaults: dict[str, Any]) -> object:
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        """Gives the batches once."""

        def __init__(self) -> None:
            self._feeds: Iterator[dict[str, numpy.ndarray]] = (
                {**defaults, **{name: tensor.numpy() for name, tensor in batch.items()}} for batch in batches
            )

        def get_next(self) -> dict[str, numpy.ndarray] | None:
            return next(self._feeds, None)

    return Reader()
