"""The SVD form of AdaLoRA: ΔW = s · P diag(λ) Q (Zhang et al. 2023, arXiv 2303.10512, equation 3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch.fx import Node

from passes.forms.base import AdapterForm, NodeEmitter

aten = torch.ops.aten

#: The convolution over each number of spatial dimensions.
_POINTWISE = {1: aten.conv1d.default, 2: aten.conv2d.default, 3: aten.conv3d.default}


@dataclasses.dataclass(frozen=True)
class SvdForm(AdapterForm):
    """P: [out, r], ``lam`` (λ): [r], Q: [r, in].

    On activations the order is ((x Qᵀ) ∘ sλ) Pᵀ: no product is larger than the activations times
    the rank, and with λ = 0 the result is exactly zero.
    """

    name: str = "svd"

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of P, lam and Q."""
        return {"P": (out_features, rank), "lam": (rank,), "Q": (rank, in_features)}

    def emit_activation(
        self, emitter: NodeEmitter, x: Node, parameters: Mapping[str, Node], scale: float, *, reverse: bool
    ) -> Node:
        """((x Qᵀ) ∘ sλ) Pᵀ; reversed ((x P) ∘ sλ) Q."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        if reverse:
            hidden = emitter.emit(aten.matmul.default, x, parameters["P"])
            hidden = emitter.emit(aten.mul.Tensor, hidden, scaled)
            return emitter.emit(aten.matmul.default, hidden, parameters["Q"])
        hidden = emitter.emit(aten.linear.default, x, parameters["Q"])
        hidden = emitter.emit(aten.mul.Tensor, hidden, scaled)
        return emitter.emit(aten.linear.default, hidden, parameters["P"])

    def emit_lookup(self, emitter: NodeEmitter, lookup: Node, parameters: Mapping[str, Node], scale: float) -> Node:
        """(P[x] ∘ sλ) Q; as in the weight itself, no gradient comes from the padding row."""
        x, *options = lookup.args[1:]
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        rows = emitter.emit(aten.embedding.default, parameters["P"], x, *options[:1])
        update = emitter.emit(aten.matmul.default, emitter.emit(aten.mul.Tensor, rows, scaled), parameters["Q"])
        padding = options[0] if options else -1
        if padding == -1:
            return update
        is_padding = emitter.emit(aten.unsqueeze.default, emitter.emit(aten.eq.Scalar, x, padding), -1)
        return emitter.emit(aten.where.self, is_padding, emitter.emit(aten.detach.default, update), update)

    def emit_convolution(
        self,
        emitter: NodeEmitter,
        convolution: Node,
        x: Node,
        parameters: Mapping[str, Node],
        scale: float,
        kernel: Sequence[int],
    ) -> Node:
        """Convolve with the rows of Q as r kernels, scale the r channels by sλ, mix them by P as a 1×1 kernel."""
        target, options = convolution.target, convolution.args[3:6]
        spatial = len(kernel) - 2
        down = emitter.emit(aten.reshape.default, parameters["Q"], [-1, *kernel[1:]])
        up = emitter.emit(aten.reshape.default, parameters["P"], [kernel[0], -1, *[1] * spatial])
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        scaled = emitter.emit(aten.reshape.default, scaled, [-1, *[1] * spatial])
        hidden = emitter.emit(target, x, down, None, *options)
        return emitter.emit(_POINTWISE[spatial], emitter.emit(aten.mul.Tensor, hidden, scaled), up)

    def emit_stack(
        self,
        emitter: NodeEmitter,
        product: Node,
        x: Node,
        parameters: Mapping[str, Node],
        scale: float,
        stack: Sequence[int],
        *,
        reverse: bool,
    ) -> Node:
        """((x Qᵀ) ∘ sλ) Pₑᵀ; reversed ((x Pₑ) ∘ sλ) Q. Each matrix has its own rows of P; Q is shared."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        rows = emitter.emit(aten.reshape.default, parameters["P"], [*stack[:2], -1])
        if reverse:
            hidden = emitter.emit(product.target, x, rows)
            hidden = emitter.emit(aten.mul.Tensor, hidden, scaled)
            return emitter.emit(aten.matmul.default, hidden, parameters["Q"])
        hidden = emitter.emit(aten.linear.default, x, parameters["Q"])
        hidden = emitter.emit(aten.mul.Tensor, hidden, scaled)
        return emitter.emit(product.target, hidden, emitter.emit(aten.transpose.int, rows, 1, 2))

    def emit_weight(self, emitter: NodeEmitter, parameters: Mapping[str, Node], scale: float) -> Node:
        """(P ∘ sλ) Q."""
        scaled = emitter.emit(aten.mul.Tensor, parameters["lam"], scale)
        columns = emitter.emit(aten.mul.Tensor, parameters["P"], scaled)
        return emitter.emit(aten.matmul.default, columns, parameters["Q"])

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """S · P diag(λ) Q."""
        return (parameters["P"] * (parameters["lam"] * scale)) @ parameters["Q"]
