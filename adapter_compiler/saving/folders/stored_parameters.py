"""From the tensors of a file to the parameters of an adapter, and to other changes of weights."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

#: The parameters [out, r] and [r, in] of ΔW by the names that a form has.
_FACTORS = (("P", "Q"), ("B", "A"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Expert:
    """One matrix of a stack whose adapters are in two tensors, as PEFT writes ``target_parameters``.

    A [count · r, in] holds the rows of the first matrix, then those of the second. In B [out, r · count] the columns
    of the matrices alternate.

    Attributes:
        index: which matrix.
        count: how many there are.
    """

    index: int
    count: int

    def select(self, parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """B [out, r] and A [r, in] of this matrix."""
        left, right = parameters["B"], parameters["A"]
        return {
            "B": left.reshape(len(left), -1, self.count)[..., self.index],
            "A": right.reshape(self.count, -1, right.shape[1])[self.index],
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of a tensor that is no ΔW.

    Attributes:
        field: the field of PEFT's configuration that explains it, for messages.
        key: the tensor in the file that it is made with.
        rows: the rows that the tensor replaces; ``None`` if it is added.
        scale: what the tensor is multiplied by before it is added.
    """

    field: str
    key: str
    rows: tuple[int, ...] | None = None
    scale: float = 1.0

    def apply(self, value: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        """The changed value, in its own dtype; sums are computed in float64."""
        if self.rows is None:
            return (value.double() + self.scale * tensor.double()).to(value.dtype)
        return value.index_copy(0, torch.tensor(self.rows, dtype=torch.long), tensor.to(value.dtype))


def transpose_update(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The parameters of the transposed ΔW, for a form without magnitude."""
    left, right = _find_factors(parameters)
    return {**parameters, left: parameters[right].t(), right: parameters[left].t()}


def limit_rank(parameters: Mapping[str, torch.Tensor], largest: int) -> dict[str, torch.Tensor]:
    """The same ΔW with no more triplets than its smaller dimension; within float32 rounding if any are left out.

    PEFT does not bound the rank: r = 8 on a weight of 4 × 16 is B [4, 8] and A [8, 16].
    """
    if not any(left in parameters for left, _ in _FACTORS):  # a form of other names, which PEFT does not have
        return dict(parameters)
    left, right = _find_factors(parameters)
    if parameters[left].shape[1] <= largest:
        return dict(parameters)
    dtype = torch.promote_types(parameters[left].dtype, torch.float32)
    wide = {name: tensor.double() for name, tensor in parameters.items()}
    product = (wide[left] * wide.get("lam", torch.ones((), dtype=torch.float64))) @ wide[right]
    unit = torch.eye(largest, dtype=torch.float64)
    factors = {left: unit, right: product} if len(product) == largest else {left: product, right: unit}
    weights = {"lam": torch.ones(largest)} if "lam" in parameters else {}
    return {**parameters, **{name: tensor.to(dtype) for name, tensor in (factors | weights).items()}}


def _find_factors(parameters: Mapping[str, torch.Tensor]) -> tuple[str, str]:
    return next(pair for pair in _FACTORS if pair[0] in parameters)
