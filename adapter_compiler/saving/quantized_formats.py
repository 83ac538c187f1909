"""Which format each quantized weight had while adapters were trained over it, as files say it.

An adapter that was trained over a quantized weight corrects the values that the quantized weight stands for, Q(W). In
the sum with W, which a checkpoint in full precision has, it corrects something else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from adapter_compiler.errors import CheckpointError
from passes.planning.json_schema import Field, Source, check_object, is_text
from passes.quantize.packed_weights import QUANTIZERS, PackedWeight, find_packed_weights

_DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)
}

_SCHEMA: Mapping[str, Field] = {
    "format": Field(expected="the name of a format", fits=is_text),
    "dtype": Field(
        expected=f"one of {', '.join(_DTYPES)}", fits=lambda value: isinstance(value, str) and value in _DTYPES
    ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizedFormat:
    """How a weight was quantized.

    Attributes:
        name: the name of the quantizer, such as ``"nf4"``.
        dtype: the dtype that the weight had before, and has when it is unpacked.
    """

    name: str
    dtype: torch.dtype

    def round_trip(self, weight: torch.Tensor) -> torch.Tensor:
        """The values that the weight has after quantizing and unpacking, in the weight's own dtype.

        Raises:
            CheckpointError: weights cannot be packed in this format here.
            MissingDependencyError: the library that packs them is not installed.
        """
        if self.name not in QUANTIZERS:
            known = ", ".join(QUANTIZERS) or "none"
            raise CheckpointError(
                f"weights cannot be quantized to {self.name!r} again, expected one of {known}; fold with "
                "base_weights='given' to add the updates to the weights as they are"
            )
        return QUANTIZERS[self.name].pack(weight.to(self.dtype)).unpack().to(weight.dtype)


def find_formats(module: nn.Module) -> dict[str, QuantizedFormat]:
    """The format of each quantized weight of a model, under all of its names."""
    found = {}
    for name, parameter in find_packed_weights(module).items():
        assert isinstance(parameter, PackedWeight)
        found[name] = QuantizedFormat(name=parameter.packed.format_name, dtype=parameter.packed.dtype)
    return found


def describe_formats(formats: Mapping[str, QuantizedFormat]) -> dict[str, dict[str, str]]:
    """Formats by weight, as JSON can hold them."""
    return {name: {"format": one.name, "dtype": str(one.dtype).removeprefix("torch.")} for name, one in formats.items()}


def read_formats(source: Source, values: Mapping[str, Any]) -> dict[str, QuantizedFormat]:
    """The formats that :func:`describe_formats` gave.

    Raises:
        CheckpointError: or the source's error: an entry is no format.
    """
    found = {}
    for name, value in values.items():
        entry = check_object(source, f"quantized: {name}", value, _SCHEMA)
        found[name] = QuantizedFormat(name=entry["format"], dtype=_DTYPES[entry["dtype"]])
    return found
