"""DoRA: W' = m ∘ (W + ΔW) / ‖W + ΔW‖, a magnitude and a direction (Liu et al. 2024, arXiv 2402.09353, equation 5)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from passes.forms.base import AdapterForm, Call, Emitter, Value

aten = torch.ops.aten

#: The parameter m.
MAGNITUDE = "magnitude"


@dataclasses.dataclass(frozen=True)
class DoraForm(AdapterForm):
    """A magnitude for each row of the adapted weight, with ΔW from another form.

    ``magnitude`` (m): [out], initially ‖W‖ by rows, so that W' = W. The rows are those of ΔW [out, in]: the output
    features of a product or a convolution, the entries of an embedding. Backward takes the norm as a constant
    (section 4.3 of the paper). A row of zeros stays zero and does not train, because it has no direction.

    Attributes:
        inner: the form that gives ΔW.
    """

    inner: AdapterForm

    @property
    def name(self) -> str:  # type: ignore[override]
        """``dora`` on LoRA, else ``dora-`` and the name of the inner form."""
        return "dora" + self.inner.name.removeprefix("lora") if self._is_on_lora else f"dora-{self.inner.name}"

    @property
    def frozen(self) -> frozenset[str]:
        """The frozen parameters of the inner form."""
        return self.inner.frozen

    @property
    def rescales(self) -> bool:
        """Always true."""
        return True

    @property
    def core(self) -> AdapterForm:
        """DoRA on the core of the inner form."""
        return DoraForm(self.inner.core)

    def is_empty(self, rank: int) -> bool:
        """Always false: the magnitude does not depend on the rank."""
        return False

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inner form's parameters and of the magnitude."""
        return self.inner.parameter_shapes(out_features, in_features, rank) | {MAGNITUDE: (out_features,)}

    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """The inner form's x ΔWᵀ; the caller rescales the sum by :meth:`emit_factor`."""
        return self.inner.emit_activation(emitter, x, parameters, scale, reverse=reverse)

    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """The inner form's rows of ΔW."""
        return self.inner.emit_lookup(emitter, lookup, parameters, scale)

    def emit_convolution(
        self,
        emitter: Emitter,
        convolution: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        kernel: Sequence[int],
    ) -> Value:
        """The inner form's convolution with ΔW."""
        return self.inner.emit_convolution(emitter, convolution, x, parameters, scale, kernel)

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
        """The inner form's product with the matrices of ΔW."""
        return self.inner.emit_stack(emitter, product, x, parameters, scale, stack, reverse=reverse)

    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """The inner form's ΔW, before the sum is rescaled."""
        return self.inner.emit_weight(emitter, parameters, scale)

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """The inner form's ΔW, before the sum is rescaled."""
        return self.inner.delta(parameters, scale)

    def emit_factor(self, emitter: Emitter, weight: Value, parameters: Mapping[str, Value], scale: float) -> Value:
        """m / ‖W + ΔW‖, or m where the norm is 0; nothing is saved to differentiate the norm."""
        own = {name: node for name, node in parameters.items() if name != MAGNITUDE}
        constants = {name: emitter.emit(aten.detach.default, node) for name, node in own.items()}
        total = emitter.emit(aten.add.Tensor, weight, self.inner.emit_weight(emitter, constants, scale))
        norm = emitter.emit(aten.linalg_vector_norm.default, total, 2, [1])
        divisor = emitter.emit(aten.add.Tensor, norm, emitter.emit(aten.eq.Scalar, norm, 0))
        return emitter.emit(aten.div.Tensor, parameters[MAGNITUDE], divisor)

    def factor(self, total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """m / ‖W + ΔW‖, or m where the norm is 0; the norm is detached."""
        magnitude = parameters[MAGNITUDE]
        norm = measure_rows(total.to(magnitude.dtype))
        return magnitude / (norm + (norm == 0))

    @property
    def _is_on_lora(self) -> bool:
        return self.inner.core.name == "lora"


def measure_rows(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖ by rows, [out], for W [out, in], detached."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight.detach(), dim=1)
    return norms
