"""Packed weights in bitsandbytes' codes (QLoRA, arXiv 2305.14314; LLM.int8, arXiv 2208.07339).

    nf4     blocks of 64 values, each 4 bits of the normal-float code and an absmax; the absmax are themselves
            quantized to 8 bits in blocks of 256 ("double quantization"): about 4.13 bits a value
    int8    rows with one absmax each, 8 bits a value; products run on the unpacked weight, so that activations
            are not quantized

bitsandbytes is imported when a quantizer is first asked for.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from adapter_compiler.errors import ConfigError, MissingDependencyError
from passes.quantize.packed_weights import PackedValues, Quantizer

if TYPE_CHECKING:
    from types import ModuleType

#: Values that share an absmax in NF4, as the paper has it.
BLOCK_SIZE = 64

#: Dtypes that bitsandbytes packs as they are; wider values are packed from float32.
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Nf4Values(PackedValues):
    """A matrix in bitsandbytes' 4-bit code.

    Attributes:
        codes: two values a byte.
        state: bitsandbytes' ``QuantState``: absmax, its own quantization, block sizes, shape and dtype.
    """

    codes: torch.Tensor
    state: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that it was packed from."""
        dtype: torch.dtype = self.state.dtype
        return dtype

    def unpack(self) -> torch.Tensor:
        """The values, block by block."""
        dense: torch.Tensor = import_bitsandbytes().functional.dequantize_4bit(self.codes, self.state)
        return dense.reshape(self.shape)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Codes, absmax, and what they are looked up in."""
        found = {"codes": self.codes, "absmax": self.state.absmax, "code": self.state.code}
        if self.state.nested:
            nested = self.state.state2
            found |= {"offset": self.state.offset, "nested_absmax": nested.absmax, "nested_code": nested.code}
        return found

    def to(self, device: torch.device) -> Nf4Values:
        """The same values on a device."""
        if self.codes.device == device:
            return self
        state = copy.deepcopy(self.state)
        state.to(device)
        return Nf4Values(self.codes.to(device), state)


@dataclasses.dataclass(frozen=True)
class Int8Values(PackedValues):
    """A matrix whose rows are int8 times an absmax / 127.

    Attributes:
        codes: [rows, columns], int8.
        absmax: [rows], float32.
        original: dtype that it was packed from.
    """

    codes: torch.Tensor
    absmax: torch.Tensor
    original: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.codes.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype that it was packed from."""
        return self.original

    def unpack(self) -> torch.Tensor:
        """The values, row by row; one pass over the matrix where bitsandbytes' own function makes three."""
        scales = (self.absmax * (1 / 127)).unsqueeze(1)
        return self.codes.to(torch.float32).mul_(scales).to(self.original)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """Codes and absmax."""
        return {"codes": self.codes, "absmax": self.absmax}

    def to(self, device: torch.device) -> Int8Values:
        """The same values on a device."""
        return Int8Values(self.codes.to(device), self.absmax.to(device), self.original)


class Nf4Quantizer:
    """NF4 with double quantization."""

    name = "nf4"

    def pack(self, weight: torch.Tensor) -> Nf4Values:
        """The code of a matrix."""
        functional = import_bitsandbytes().functional
        values = _as_packable(weight)
        codes, state = functional.quantize_4bit(
            values, blocksize=BLOCK_SIZE, compress_statistics=True, quant_type="nf4"
        )
        return Nf4Values(codes, state)


class Int8Quantizer:
    """Int8 by rows."""

    name = "int8"

    def pack(self, weight: torch.Tensor) -> Int8Values:
        """The code of a matrix."""
        functional = import_bitsandbytes().functional
        # From float16, as LLM.int8 does and as the kernels want it: that rounds 30 times finer than the code.
        codes, absmax, _ = functional.int8_vectorwise_quant(weight.contiguous().half())
        return Int8Values(codes, absmax, weight.dtype)


def find_quantizer(name: str) -> Quantizer:
    """The quantizer of this name.

    Raises:
        ConfigError: there is none.
        MissingDependencyError: bitsandbytes is not installed.
    """
    quantizers: dict[str, Quantizer] = {"nf4": Nf4Quantizer(), "int8": Int8Quantizer()}
    if name not in quantizers:
        raise ConfigError(f"quantize={name!r}: expected one of {', '.join(map(repr, quantizers))}, or None")
    import_bitsandbytes()
    return quantizers[name]


def import_bitsandbytes() -> ModuleType:
    """The library, imported now.

    Raises:
        MissingDependencyError: it is not installed, or does not load.
    """
    try:
        import bitsandbytes
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingDependencyError(
            f"quantized base weights need bitsandbytes, which cannot be imported ({error}); install it with "
            "pip install 'adapter-compiler[qlora]'"
        ) from error
    module: ModuleType = bitsandbytes
    return module


def _as_packable(weight: torch.Tensor) -> torch.Tensor:
    return weight.contiguous() if weight.dtype in _PACKABLE else weight.float()
