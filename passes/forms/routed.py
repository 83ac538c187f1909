"""Updates that depend on the call: a mixture of experts, and adapters that act on some tokens only.

    svd     y + s ((x Qᵀ) ∘ λ ∘ g) Pᵀ          lora     y + s ((x Aᵀ) ∘ g) Bᵀ

The gates g have the leading dimensions of x. In a mixture of k experts, the r triplets are k groups of r / k, and each
token has a gate for each group, so that one pair of products computes all experts. Under a mask, a token has one gate,
1 or 0. Such an update is no matrix that could be added to the weight, so it exists on activations only.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from passes.base import SiteError
from passes.forms.base import AdapterForm, Call, Emitter, Value

aten = torch.ops.aten

#: The name of the router's parameter, [experts, in].
ROUTER = "router"

#: The name under which :meth:`RoutedForm.emit_activation` gets the gates, besides the parameters: [..., groups].
GATES = "gates"

#: Names of the right factor, of λ, and of the left factor.
_FACTORS: Mapping[str, tuple[str, str | None, str]] = {"svd": ("Q", "lam", "P"), "lora": ("A", None, "B")}

#: The forms that a routed form can have inside.
ROUTABLE = tuple(_FACTORS)


@dataclasses.dataclass(frozen=True)
class RoutedForm(AdapterForm):
    """A form of the names :data:`ROUTABLE` with gates between its factors.

    Attributes:
        inner: the form.
    """

    inner: AdapterForm

    @property
    def is_routed(self) -> bool:
        """True."""
        return True

    @property
    @abc.abstractmethod
    def groups(self) -> int:
        """The number of gates of a token; the rank is a multiple of it."""

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inner form's parameters."""
        return self.inner.parameter_shapes(out_features, in_features, rank)

    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """((x Qᵀ) ∘ sλ ∘ g) Pᵀ, or ((x P) ∘ sλ ∘ g) Q if ``reverse``; ``parameters`` has the gates g as well."""
        right, lam, left = _FACTORS[self.inner.name]
        middle = scale if lam is None else emitter.emit(aten.mul.Tensor, parameters[lam], scale)
        product = aten.matmul.default if reverse else aten.linear.default
        first, second = (left, right) if reverse else (right, left)
        hidden = emitter.emit(aten.mul.Tensor, emitter.emit(product, x, parameters[first]), middle)
        return emitter.emit(product, self._emit_gated(emitter, hidden, parameters[GATES]), parameters[second])

    def _emit_gated(self, emitter: Emitter, hidden: Value, gates: Value) -> Value:
        """The hidden values [..., r] times the gate of their group."""
        if self.groups == 1:
            return emitter.emit(aten.mul.Tensor, hidden, gates)
        grouped = emitter.emit(aten.unflatten.int, hidden, -1, [self.groups, -1])
        grouped = emitter.emit(aten.mul.Tensor, grouped, emitter.emit(aten.unsqueeze.default, gates, -1))
        return emitter.emit(aten.flatten.using_ints, grouped, -2, -1)

    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """Not possible.

        Raises:
            SiteError: always, as do the other methods for uses that are no product.
        """
        self._refuse()

    def emit_convolution(
        self,
        emitter: Emitter,
        convolution: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        kernel: Sequence[int],
    ) -> Value:
        """Not possible."""
        self._refuse()

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
        """Not possible."""
        self._refuse()

    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """Not possible."""
        self._refuse()

    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """Not possible."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise SiteError(f"an update of the form {self.name!r} depends on the call and is no matrix; {FIXED}")


#: What to do where an update must be a matrix.
FIXED = (
    "expected a form that adds one matrix, such as 'svd' or 'lora'; for that matrix under fixed gates, call "
    "adapted.fix_routing(gates, name=...) and use(...) the adapter that it adds"
)


@dataclasses.dataclass(frozen=True)
class MixtureForm(RoutedForm):
    """A mixture of experts; each group of triplets is an expert, and a linear router gives the gates.

    Attributes:
        inner: what an expert computes.
        experts: the number k of experts.
        top_k: how many experts a token has; 0 for all.
        per_example: whether all tokens of an example, its first dimension, have the gates of their mean.
        leader: the site whose gates are used; empty if this site has the router itself.
    """

    experts: int
    top_k: int = 0
    per_example: bool = False
    leader: str = ""

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in ``lora-experts4``, ``svd-experts8-top2-example`` or ``lora-experts4@encoder.0.query.weight``."""
        top = f"-top{self.top_k}" if self.top_k else ""
        leader = f"@{self.leader}" if self.leader else ""
        return f"{self.inner.name}-experts{self.experts}{top}{'-example' if self.per_example else ''}{leader}"

    @property
    def groups(self) -> int:
        """The number of experts."""
        return self.experts

    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the inner form's parameters and of the router, where the site has it."""
        router = {} if self.leader else {ROUTER: (self.experts, in_features)}
        return super().parameter_shapes(out_features, in_features, rank) | router


@dataclasses.dataclass(frozen=True)
class MaskedForm(RoutedForm):
    """An update for the tokens that a mask names; elsewhere, and in calls without a mask, there is none.

    Attributes:
        inner: the form of the update.
        argument: the argument of the model's ``forward`` that is the mask.
    """

    argument: str

    @property
    def name(self) -> str:  # type: ignore[override]
        """As in ``lora-masked@image_mask``."""
        return f"{self.inner.name}-masked@{self.argument}"

    @property
    def groups(self) -> int:
        """One gate."""
        return 1
