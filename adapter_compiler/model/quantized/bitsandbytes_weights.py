"""Packed weights in bitsandbytes' formats (QLoRA, arXiv 2305.14314; LLM.int8, arXiv 2208.07339).

    nf4     4 bits a value in the NormalFloat code, one absmax for each block of 64 values; the absmax are quantized
            to 8 bits in blocks of 256 ("double quantization"): about 4.13 bits a value in all
    int8    8 bits a value, one absmax for each row; products run on the unpacked weight, so activations are not
            quantized

bitsandbytes is imported at the first use of a quantizer.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from adapter_compiler.errors import ConfigError, MissingDependencyError
from passes.quantize.packed_weights import QUANTIZERS, PackedValues, Quantizer

if TYPE_CHECKING:
    from types import ModuleType

#: The number of values that share an absmax in NF4, as in the paper.
BLOCK_SIZE = 64

#: Dtypes that bitsandbytes packs directly; others are converted to float32 first.
_PACKABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Nf4Values(PackedValues):
    """A matrix in one of bitsandbytes' 4-bit formats.

    Attributes:
        codes: the codes, two in each byte.
        state: bitsandbytes' ``QuantState``: absmax and its quantization, block sizes, shape and dtype.
    """

    codes: torch.Tensor
    state: Any

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""
        return tuple(self.state.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the matrix before packing."""
        dtype: torch.dtype = self.state.dtype
        return dtype

    @property
    def format_name(self) -> str:
        """The name of the quantizer that packs such values; for other sizes of blocks a description."""
        name = Nf4Quantizer(self.state.quant_type, bool(self.state.nested)).name
        return name if self.state.blocksize == BLOCK_SIZE else f"{name} in blocks of {self.state.blocksize}"

    def unpack(self) -> torch.Tensor:
        """The matrix in its original dtype."""
        dense: torch.Tensor = import_bitsandbytes().functional.dequantize_4bit(self.codes, self.state)
        return dense.reshape(self.shape)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The codes, the absmax and the code tables, by name."""
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
    """A matrix of int8 codes; row i is codes[i] · absmax[i] / 127.

    Attributes:
        codes: [rows, columns], int8.
        absmax: [rows], float32.
        original: dtype of the matrix before packing.
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
        """Dtype of the matrix before packing."""
        return self.original

    @property
    def format_name(self) -> str:
        """The name of the quantizer that packs such values."""
        return Int8Quantizer.name

    def unpack(self) -> torch.Tensor:
        """The matrix in its original dtype; in one pass over it, where bitsandbytes' function needs three."""
        scales = (self.absmax * (1 / 127)).unsqueeze(1)
        return self.codes.to(torch.float32).mul_(scales).to(self.original)

    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The codes and the absmax, by name."""
        return {"codes": self.codes, "absmax": self.absmax}

    def to(self, device: torch.device) -> Int8Values:
        """The same values on a device."""
        return Int8Values(self.codes.to(device), self.absmax.to(device), self.original)


@dataclasses.dataclass(frozen=True)
class Nf4Quantizer:
    """Packs matrices in one of bitsandbytes' 4-bit formats; by default in NF4 with double quantization.

    Attributes:
        code: ``"nf4"`` or ``"fp4"``.
        is_double: whether the absmax are quantized too.
    """

    code: str = "nf4"
    is_double: bool = True

    @property
    def name(self) -> str:
        """Its name, also in files."""
        return self.code if self.is_double else f"{self.code} without double quantization"

    def pack(self, weight: torch.Tensor) -> Nf4Values:
        """The packed values of a matrix."""
        functional = import_bitsandbytes().functional
        codes, state = functional.quantize_4bit(
            _as_packable(weight), blocksize=BLOCK_SIZE, compress_statistics=self.is_double, quant_type=self.code
        )
        return Nf4Values(codes, state)


class Int8Quantizer:
    """Packs matrices in int8 with one absmax a row."""

    name = "int8"

    def pack(self, weight: torch.Tensor) -> Int8Values:
        """The packed values of a matrix."""
        functional = import_bitsandbytes().functional
        # From float16, as in LLM.int8 and as the kernels require; its rounding is 30 times finer than that of int8.
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


_FORMATS: tuple[Quantizer, ...] = (
    *(Nf4Quantizer(code, is_double) for code in ("nf4", "fp4") for is_double in (True, False)),
    Int8Quantizer(),
)
QUANTIZERS.update({quantizer.name: quantizer for quantizer in _FORMATS})


def import_bitsandbytes() -> ModuleType:
    """Import bitsandbytes.

    Raises:
        MissingDependencyError: it is not installed or cannot be loaded.
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
