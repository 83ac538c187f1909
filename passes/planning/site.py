"""The site of an adapter: a weight that can have one, or some rows of it."""

from __future__ import annotations

import dataclasses
import fnmatch
import math
from collections.abc import Iterable, Sequence

import torch
from torch.nn import functional


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterSite:
    """A weight that can have an adapter, or some rows of it.

    Attributes:
        name: the weight's qualified name (the first, if it is tied); for some rows ``<weight>.rows_<first>_<end>``.
        shape: the weight's shape.
        dtype: the weight's dtype.
        transposed: the weight is stored [in, out] (``x @ W``), not [out, in] (``x @ W.T``).
        op: ``linear`` if every use is a matrix product, else the first other operator.
        aliases: other names of the same Parameter.
        role: what the weight is for, see :mod:`passes.analysis.roles`; ``linear`` if there was no graph.
        depth: the number of the block that uses it, see :mod:`passes.analysis.blocks`; ``None`` outside blocks.
        rows: the rows (output features) that it covers, as ``(first, end)`` without the end; ``None`` for all.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    transposed: bool = False
    op: str = "linear"
    aliases: tuple[str, ...] = ()
    role: str = "linear"
    depth: int | None = None
    rows: tuple[int, int] | None = None

    @property
    def weight(self) -> str:
        """The qualified name of the weight itself."""
        return self.name if self.rows is None else self.name.rpartition(".")[0]

    @property
    def size(self) -> int:
        """Number of elements of the weight."""
        return math.prod(self.shape)

    @property
    def weight_rows(self) -> int:
        """Output features of the whole weight; the leading dimensions of stacked matrices are flattened."""
        return self._matrix_shape[1 if self.transposed else 0]

    @property
    def out_features(self) -> int:
        """d1, the rows of ΔW."""
        return self.weight_rows if self.rows is None else self.rows[1] - self.rows[0]

    @property
    def in_features(self) -> int:
        """d2, the columns of ΔW; the trailing dimensions of a convolution kernel are flattened."""
        return self._matrix_shape[0 if self.transposed else 1]

    def to_matrix(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows that the site covers, of the weight or of its gradient, as [out, in]; a view where possible."""
        matrix = weight.t() if self.transposed else weight.reshape(self._matrix_shape)
        return matrix if self.rows is None else matrix[self.rows[0] : self.rows[1]]

    def from_matrix(self, matrix: torch.Tensor) -> torch.Tensor:
        """A matrix [out, in] in the shape and layout of the weight; 0 in rows that the site does not cover."""
        if self.rows is not None:
            first, end = self.rows
            matrix = functional.pad(matrix, (0, 0, first, self.weight_rows - end))
        return (matrix.t() if self.transposed else matrix).reshape(self.shape)

    @property
    def _matrix_shape(self) -> tuple[int, int]:
        if "conv" in self.op:
            return self.shape[0], math.prod(self.shape[1:])
        return math.prod(self.shape[:-1]), self.shape[-1]

    @property
    def largest_rank(self) -> int:
        """The largest possible rank of ΔW, min(d1, d2)."""
        return min(self.out_features, self.in_features)


def find_matching_glob(names: Iterable[str], globs: Sequence[str]) -> str | None:
    """The first glob that matches one of the qualified names, with or without its last part; ``None`` if none does."""
    candidates = [candidate for name in names for candidate in (name, name.rpartition(".")[0]) if candidate]
    for pattern in globs:
        if any(fnmatch.fnmatchcase(candidate, pattern) for candidate in candidates):
            return pattern
    return None


def abbreviate(names: Sequence[str], most: int = 12) -> str:
    """The first names and the number of all, for messages."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown}, … ({len(names)} in all)"
