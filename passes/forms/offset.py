"""An update relative to its starting values: ΔW = form(θ) − form(θ₀), with θ₀ stored.

Initializers such as PiSSA and LoRA-GA start with a ΔW that is not zero; their papers subtract it from the frozen
weight, so that the model starts unchanged. Storing the starting values instead is mathematically the same, and the
frozen weight is neither rounded nor copied, so an adapter file fits the original model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch

from passes.forms.base import AdapterForm, Call, Emitter, Value

aten = torch.ops.aten

T = TypeVar("T")

#: Suffix of the names of parameters that store starting values.
START = "_start"


@dataclasses.dataclass(frozen=True)
class OffsetForm(AdapterForm):
    """Another form minus its own value at the start of training.

    Attributes:
        inner: the form.
        start_rank: rank at the start; the starting values keep it when triplets are pruned.
    """

    inner: AdapterForm
    start_rank: int

    @property
    def name(self) -> str:  # type: ignore[override]
        """The inner form's name and the start rank, as in ``lora-offset8``."""
        return f"{self.inner.name}-offset{self.start_rank}"

    @property
    def frozen(self) -> frozenset[str]:
        """The starting values."""
        return self.inner.frozen | {name + START for name in self.inner.parameter_shapes(1, 1, 1)}

    @property
    def core(self) -> AdapterForm:
        """The form without the starting values."""
        return self.inner.core

    def is_empty(self, rank: int) -> bool:
        """False while there are starting values, which are still subtracted when the rank is 0."""
        return self.inner.is_empty(rank) and self.start_rank == 0

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the form's own parameters, and of the starting values."""
        start = self.inner.parameter_shapes(out_features, in_features, self.start_rank)
        own = self.inner.parameter_shapes(out_features, in_features, rank)
        return own | {name + START: shape for name, shape in start.items()}

    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """x form(θ)ᵀ − x form(θ₀)ᵀ, or the reverse direction of both."""
        now = self.inner.emit_activation(emitter, x, parameters, scale, reverse=reverse)
        start = self.inner.emit_activation(emitter, x, self._at_start(parameters), scale, reverse=reverse)
        return emitter.emit(aten.sub.Tensor, now, start)

    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """The looked-up rows of form(θ) − those of form(θ₀)."""
        now = self.inner.emit_lookup(emitter, lookup, parameters, scale)
        start = self.inner.emit_lookup(emitter, lookup, self._at_start(parameters), scale)
        return emitter.emit(aten.sub.Tensor, now, start)

    def emit_convolution(
        self,
        emitter: Emitter,
        convolution: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        kernel: Sequence[int],
    ) -> Value:
        """The convolution with form(θ) − that with form(θ₀)."""
        now = self.inner.emit_convolution(emitter, convolution, x, parameters, scale, kernel)
        start = self.inner.emit_convolution(emitter, convolution, x, self._at_start(parameters), scale, kernel)
        return emitter.emit(aten.sub.Tensor, now, start)

    def emit_stack(
        self,
        emitter: Emitter,
        product: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        stack: Sequence[int],
        *,
        reverse: bool,
    ) -> Value:
        """The product with the matrices of form(θ) − that with the matrices of form(θ₀)."""
        now = self.inner.emit_stack(emitter, product, x, parameters, scale, stack, reverse=reverse)
        start = self.inner.emit_stack(emitter, product, x, self._at_start(parameters), scale, stack, reverse=reverse)
        return emitter.emit(aten.sub.Tensor, now, start)

    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """form(θ) − form(θ₀)."""
        now = self.inner.emit_weight(emitter, parameters, scale)
        return emitter.emit(aten.sub.Tensor, now, self.inner.emit_weight(emitter, self._at_start(parameters), scale))

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """form(θ) − form(θ₀)."""
        return self.inner.delta(parameters, scale) - self.inner.delta(self._at_start(parameters), scale)

    def _at_start(self, parameters: Mapping[str, T]) -> dict[str, T]:
        """θ₀: the starting values under the names of the inner form's parameters."""
        return {name.removesuffix(START): value for name, value in parameters.items() if name.endswith(START)}
