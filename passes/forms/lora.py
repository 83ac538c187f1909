"""LoRA: ΔW = s · B A (Hu et al. 2021, arXiv 2106.09685, equation 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from passes.forms.base import AdapterForm, Call, Emitter, Value
from passes.forms.emit import emit_rows, emit_stacked_products, emit_two_convolutions

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class LoraForm(AdapterForm):
    """B: [out, r], A: [r, in].

    On activations the order is (s (x Aᵀ)) Bᵀ, so that ΔW is never computed, and with B = 0 the result is exactly zero.
    """

    name: str = "lora"

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of B and A."""
        return {"B": (out_features, rank), "A": (rank, in_features)}

    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """(s (x Aᵀ)) Bᵀ; reversed (s (x B)) A."""
        down, up = ("B", "A") if reverse else ("A", "B")
        product = aten.matmul.default if reverse else aten.linear.default
        hidden = emitter.emit(aten.mul.Tensor, emitter.emit(product, x, parameters[down]), scale)
        return emitter.emit(product, hidden, parameters[up])

    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """(s B[x]) A."""
        return emit_rows(emitter, lookup, parameters["B"], scale, parameters["A"])

    def emit_convolution(
        self,
        emitter: Emitter,
        convolution: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        kernel: Sequence[int],
    ) -> Value:
        """The rows of A as r kernels, then s, then B as a 1×1 kernel."""
        return emit_two_convolutions(emitter, convolution, x, parameters["B"], scale, parameters["A"], kernel)

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
        """(s (x Aᵀ)) Bₑᵀ; reversed (s (x Bₑ)) A."""
        left, right = parameters["B"], parameters["A"]
        return emit_stacked_products(emitter, product, x, left, scale, right, stack, reverse=reverse)

    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """(s B) A."""
        columns = emitter.emit(aten.mul.Tensor, parameters["B"], scale)
        return emitter.emit(aten.matmul.default, columns, parameters["A"])

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """s · B A."""
        return (parameters["B"] * scale) @ parameters["A"]
