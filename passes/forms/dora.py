"""DoRA: W' = m ∘ (W + ΔW) / ‖W + ΔW‖, magnitude and direction apart (Liu et al. 2024, arXiv 2402.09353, equation 5)."""

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
    """A magnitude for each row of the adapted weight, on top of another form that gives ΔW.

    ``magnitude`` (m): [out], at the start ‖W‖ by rows, so that W' = W. The rows are those of ΔW [out, in]: the output
    features of a product or a convolution, the entries of an embedding. As the paper's section 4.3 has it, backward
    takes the norm as a constant. A row of zeros stays zero and does not train: it has no direction.

    Attributes:
        inner: the form that gives ΔW.
    """

    inner: AdapterForm

    @property
    def name(self) -> str:  # type: ignore[override]
        """``dora`` on LoRA, else as in ``dora-svd``."""
        return "dora" + self.inner.name.removeprefix("lora") if self._is_on_lora else f"dora-{self.inner.name}"

    @property
    def frozen(self) -> frozenset[str]:
        """Those of the inner form."""
        return self.inner.frozen

    @property
    def rescales(self) -> bool:
        """Yes: that is what it is for."""
        return True

    @property
    def core(self) -> AdapterForm:
        """On the core of the inner form."""
        return DoraForm(self.inner.core)

    def is_empty(self, rank: int) -> bool:
        """Never: the magnitude has no rank."""
        return False

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inner form's parameters and of the magnitude."""
        return self.inner.parameter_shapes(out_features, in_features, rank) | {MAGNITUDE: (out_features,)}

    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """The inner form's; whoever inserts it rescales the sum by :meth:`emit_factor`."""
        return self.inner.emit_activation(emitter, x, parameters, scale, reverse=reverse)

    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """The inner form's."""
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
        """The inner form's."""
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
        """The inner form's."""
        return self.inner.emit_stack(emitter, product, x, parameters, scale, stack, reverse=reverse)

    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """The inner form's."""
        return self.inner.emit_weight(emitter, parameters, scale)

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """The inner form's, before the sum is rescaled."""
        return self.inner.delta(parameters, scale)

    def emit_factor(self, emitter: Emitter, weight: Value, parameters: Mapping[str, Value], scale: float) -> Value:
        """M / ‖W + ΔW‖, or m where the norm is 0; nothing of the norm is kept for backward."""
        own = {name: node for name, node in parameters.items() if name != MAGNITUDE}
        constants = {name: emitter.emit(aten.detach.default, node) for name, node in own.items()}
        total = emitter.emit(aten.add.Tensor, weight, self.inner.emit_weight(emitter, constants, scale))
        norm = emitter.emit(aten.linalg_vector_norm.default, total, 2, [1])
        divisor = emitter.emit(aten.add.Tensor, norm, emitter.emit(aten.eq.Scalar, norm, 0))
        return emitter.emit(aten.div.Tensor, parameters[MAGNITUDE], divisor)

    def factor(self, total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """M / ‖W + ΔW‖, or m where the norm is 0; the norm is detached."""
        magnitude = parameters[MAGNITUDE]
        norm = measure_rows(total.to(magnitude.dtype))
        return magnitude / (norm + (norm == 0))

    @property
    def _is_on_lora(self) -> bool:
        return self.inner.core.name == "lora"


def measure_rows(weight: torch.Tensor) -> torch.Tensor:
    """‖W‖ by rows of [out, in], without history."""
    norms: torch.Tensor = torch.linalg.vector_norm(weight.detach(), dim=1)
    return norms
