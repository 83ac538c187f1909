"""The dtypes of safetensors files, and which tensors such files can hold."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from adapter_compiler.errors import CheckpointError

#: Bits of a value, and torch's dtype where it has one.
DTYPES: Mapping[str, tuple[int, torch.dtype | None]] = {
    "F64": (64, torch.float64),
    "F32": (32, torch.float32),
    "F16": (16, torch.float16),
    "BF16": (16, torch.bfloat16),
    "F8_E4M3": (8, torch.float8_e4m3fn),
    "F8_E5M2": (8, torch.float8_e5m2),
    "F8_E4M3FNUZ": (8, torch.float8_e4m3fnuz),
    "F8_E5M2FNUZ": (8, torch.float8_e5m2fnuz),
    "F8_E8M0": (8, torch.float8_e8m0fnu),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F4": (4, None),
    "C64": (64, torch.complex64),
    "I64": (64, torch.int64),
    "I32": (32, torch.int32),
    "I16": (16, torch.int16),
    "I8": (8, torch.int8),
    "U64": (64, torch.uint64),
    "U32": (32, torch.uint32),
    "U16": (16, torch.uint16),
    "U8": (8, torch.uint8),
    "BOOL": (8, torch.bool),
}

#: The format's names of torch's dtypes.
DTYPE_NAMES: Mapping[torch.dtype, str] = {dtype: name for name, (_, dtype) in DTYPES.items() if dtype is not None}


def assert_storable(name: str, tensor: torch.Tensor) -> None:
    """Raise :class:`CheckpointError` unless a safetensors file can hold a tensor."""
    if tensor.is_meta:
        raise CheckpointError(
            f"{name} is on the meta device, which holds no values; expected a tensor with values; load them first"
        )
    if tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{name} is a tensor of {tensor.dtype} and {tensor.layout}, which a safetensors file cannot hold; expected "
            "a dense tensor of another dtype; convert it before it is saved"
        )
