"""Frozen weights that stay quantized in memory and behave like ordinary tensors.

A :class:`PackedWeight` has the shape and dtype of the weight that it replaces, but the memory of the quantized code.
Every operator that reads its values dequantizes them for that one operation. Transposes and dtype changes are lazy, so
autograd saves the code for backward, and backward dequantizes again. No quantization library is used here: callers
pass a :class:`Quantizer`.
"""

from __future__ import annotations

import abc
import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from passes.compat import make_wrapper, no_torch_function, pytree

aten = torch.ops.aten


class PackedValues(abc.ABC):
    """A quantized matrix. Deep copies and pickles contain its tensors once."""

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix."""

    @property
    @abc.abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the dequantized values."""

    @abc.abstractmethod
    def unpack(self) -> torch.Tensor:
        """The dequantized values as a new tensor of :attr:`shape` and :attr:`dtype`."""

    @abc.abstractmethod
    def tensors(self) -> Mapping[str, torch.Tensor]:
        """The tensors of the quantized code by name, all on one device."""

    @abc.abstractmethod
    def to(self, device: torch.device) -> PackedValues:
        """The same values on a device."""

    @property
    def format_name(self) -> str:
        """The name in :data:`QUANTIZERS` of what packs such values; any other if nothing there does."""
        return type(self).__name__

    @property
    def device(self) -> torch.device:
        """The device of the code."""
        return next(iter(self.tensors().values())).device

    @property
    def nbytes(self) -> int:
        """Size of the code in bytes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors().values())


class Quantizer(Protocol):
    """Quantizes matrices."""

    @property
    def name(self) -> str:
        """Its name in options."""

    def pack(self, weight: torch.Tensor) -> PackedValues:
        """Quantize a matrix [rows, columns]."""


#: Quantizers by the names of their formats. A module that uses a quantization library adds its own.
QUANTIZERS: dict[str, Quantizer] = {}


class PackedWeight(torch.Tensor):
    """A weight whose values are quantized.

    ``transpose`` of both dimensions, ``detach`` and ``to`` return packed weights; all other operators return plain
    tensors. It gets no gradient; products with it compute the gradient of their other operand.
    """

    __slots__ = ("is_transposed", "packed")
    __torch_function__ = no_torch_function

    packed: PackedValues
    is_transposed: bool

    @staticmethod
    def __new__(
        cls, values: PackedValues, *, dtype: torch.dtype | None = None, is_transposed: bool = False
    ) -> PackedWeight:
        """A weight with these values, in their dtype unless another is given."""
        shape = values.shape[::-1] if is_transposed else values.shape
        dtype = values.dtype if dtype is None else dtype
        made: PackedWeight = make_wrapper(cls, shape, dtype=dtype, device=values.device)
        made.packed = values
        made.is_transposed = is_transposed
        return made

    def unpack(self) -> torch.Tensor:
        """The dequantized values as a plain tensor."""
        dense = self.packed.unpack().to(self.dtype)
        return dense.t() if self.is_transposed else dense

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"PackedWeight({type(self.packed).__name__}, shape={tuple(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedWeight:
        copied = self._with(values=copy.deepcopy(self.packed, memo))
        memo[id(self)] = copied
        copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (self.packed, self.dtype, self.is_transposed, self.__dict__)

    def _with(self, **changed: Any) -> PackedWeight:
        options = {"values": self.packed, "dtype": self.dtype, "is_transposed": self.is_transposed, **changed}
        return PackedWeight(options.pop("values"), **options)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Run the operator on the packed weight if that is possible, else on the dequantized values."""
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, PackedWeight):
            if func in _SAME:
                return first._with()
            if func in _TRANSPOSES and _swaps(func, args):
                return first._with(is_transposed=not first.is_transposed)
            if func is aten._to_copy.default:
                return _convert(first, **kwargs)
            if func is aten.copy_.default:
                return _overwrite(first, args[1])
        args, kwargs = pytree.tree_map_only(PackedWeight, PackedWeight.unpack, (args, kwargs))
        return func(*args, **kwargs)


_SAME = {aten.detach.default, aten.alias.default}
_TRANSPOSES = {aten.t.default, aten.transpose.int, aten.permute.default}


def _swaps(func: Any, args: Any) -> bool:
    if func is aten.transpose.int:
        return bool(args[1] % 2 != args[2] % 2)
    return func is aten.t.default or [d % 2 for d in args[1]] == [1, 0]


def _convert(
    weight: PackedWeight, *, dtype: torch.dtype | None = None, device: torch.device | None = None, **_: Any
) -> torch.Tensor:
    if dtype is not None and not dtype.is_floating_point:
        return weight.unpack().to(dtype=dtype, device=device)
    moved = weight.packed if device is None else weight.packed.to(torch.device(device))
    return weight._with(values=moved, dtype=weight.dtype if dtype is None else dtype)


def _overwrite(weight: PackedWeight, source: torch.Tensor) -> PackedWeight:
    """Copy the code of another weight, as loading a state dict does."""
    mine, theirs = weight.packed, source.packed if isinstance(source, PackedWeight) else None
    if theirs is None or type(theirs) is not type(mine) or theirs.shape != mine.shape:
        kind = type(theirs).__name__ if theirs is not None else f"plain {source.dtype}"
        raise TypeError(
            f"values cannot be written into a quantized weight: found {kind} of shape {tuple(source.shape)}, expected "
            f"{type(mine).__name__} of {tuple(weight.shape)}; quantize both models in the same way"
        )
    target = mine.tensors()
    for name, tensor in theirs.tensors().items():
        target[name].copy_(tensor)
    return weight


def _rebuild(values: PackedValues, dtype: torch.dtype, is_transposed: bool, attributes: dict[str, Any]) -> PackedWeight:
    weight = PackedWeight(values, dtype=dtype, is_transposed=is_transposed)
    weight.__dict__.update(attributes)
    return weight


def pack_parameter(parameter: nn.Parameter, quantizer: Quantizer) -> nn.Parameter:
    """A frozen Parameter with the quantized values and the attributes of ``parameter``."""
    packed = PackedWeight(quantizer.pack(parameter.detach()), dtype=parameter.dtype)
    return as_parameter(packed, parameter.__dict__)


def as_parameter(weight: torch.Tensor, attributes: Mapping[str, Any]) -> nn.Parameter:
    """A frozen Parameter of a packed weight, with these attributes."""
    made = nn.Parameter(weight, requires_grad=False)
    made.__dict__.update({key: value for key, value in attributes.items() if key != "_is_param"})
    return made


def find_packed_weights(module: nn.Module) -> dict[str, nn.Parameter]:
    """The packed parameters under all of their names."""
    named = module.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if isinstance(parameter, PackedWeight)}


def is_packed(tensor: torch.Tensor) -> bool:
    """Whether a tensor is a :class:`PackedWeight`."""
    return isinstance(tensor, PackedWeight)


def read_parameter(module: nn.Module, name: str) -> nn.Parameter:
    """The parameter that is registered under a qualified name, even if a property of that name returns another."""
    path, _, leaf = name.rpartition(".")
    parameter = module.get_submodule(path)._parameters[leaf]
    assert parameter is not None
    return parameter


def set_parameter(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
    """Replace the parameter that is registered under a qualified name."""
    path, _, leaf = name.rpartition(".")
    module.get_submodule(path)._parameters[leaf] = parameter


def count_bytes(tensor: torch.Tensor) -> int:
    """Size of a tensor's values in bytes, packed or not."""
    return tensor.packed.nbytes if isinstance(tensor, PackedWeight) else tensor.numel() * tensor.element_size()


@contextlib.contextmanager
def moved_weights(module: nn.Module, move: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Remove packed weights from the module; afterwards, put them back as ``move`` returns them.

    This is for ``Module._apply``, which moves the storage of a Parameter; a packed weight has none. After an error in
    the block, the original weights are put back.
    """
    packed = find_packed_weights(module)
    moved: dict[int, nn.Parameter] = {}
    try:
        for name in packed:
            set_parameter(module, name, None)
        yield
        moved = {id(p): as_parameter(move(p), p.__dict__) for p in packed.values()}
    finally:
        for name, parameter in packed.items():
            set_parameter(module, name, moved.get(id(parameter), parameter))


@contextlib.contextmanager
def weights_without_storage(module: nn.Module) -> Iterator[None]:
    """Inside, each packed weight is replaced by an ordinary Parameter without storage, which an export can trace."""
    packed = find_packed_weights(module)
    replacements = {id(p): _without_storage(p) for p in packed.values()}
    try:
        for name, parameter in packed.items():
            set_parameter(module, name, replacements[id(parameter)])
        yield
    finally:
        for name, parameter in packed.items():
            set_parameter(module, name, parameter)


def _without_storage(parameter: nn.Parameter) -> nn.Parameter:
    dense = torch.empty(parameter.shape, dtype=parameter.dtype, device=parameter.device)
    dense.untyped_storage().resize_(0)
    return nn.Parameter(dense, requires_grad=False)
