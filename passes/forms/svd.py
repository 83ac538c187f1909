"""The SVD form of AdaLoRA: ΔW = s · P diag(λ) Q (Zhang et al. 2023, arXiv 2303.10512, equation 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from passes.forms.base import AdapterForm, Call, Emitter, Value
from passes.forms.emit import emit_rows, emit_stacked_products, emit_two_convolutions

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class SvdForm(AdapterForm):
    """P: [out, r], ``lam`` (λ): [r], Q: [r, in].

    On activations the order is ((x Qᵀ) ∘ sλ) Pᵀ, so that ΔW is never computed, and with λ = 0 the result is exactly
    zero.
    """

    name: str = "svd"

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of P, lam and Q."""
        return {"P": (out_features, rank), "lam": (rank,), "Q": (rank, in_features)}

    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """((x Qᵀ) ∘ sλ) Pᵀ; reversed ((x P) ∘ sλ) Q."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        if reverse:
            hidden = emitter.emit(aten.matmul.default, x, parameters["P"])
            hidden = emitter.emit(aten.mul.Tensor, hidden, scaled)
            return emitter.emit(aten.matmul.default, hidden, parameters["Q"])
        hidden = emitter.emit(aten.linear.default, x, parameters["Q"])
        hidden = emitter.emit(aten.mul.Tensor, hidden, scaled)
        return emitter.emit(aten.linear.default, hidden, parameters["P"])

    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """(P[x] ∘ sλ) Q."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        return emit_rows(emitter, lookup, parameters["P"], scaled, parameters["Q"])

    def emit_convolution(
        self,
        emitter: Emitter,
        convolution: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        kernel: Sequence[int],
    ) -> Value:
        """The rows of Q as r kernels, then sλ, then P as a 1×1 kernel."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        return emit_two_convolutions(emitter, convolution, x, parameters["P"], scaled, parameters["Q"], kernel)

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
        """((x Qᵀ) ∘ sλ) Pₑᵀ; reversed ((x Pₑ) ∘ sλ) Q."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        left, right = parameters["P"], parameters["Q"]
        return emit_stacked_products(emitter, product, x, left, scaled, right, stack, reverse=reverse)

    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """(P ∘ sλ) Q."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        columns = emitter.emit(aten.mul.Tensor, parameters["P"], scaled)
        return emitter.emit(aten.matmul.default, columns, parameters["Q"])

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """s · P diag(λ) Q."""
        return (parameters["P"] * (parameters["lam"] * scale)) @ parameters["Q"]
