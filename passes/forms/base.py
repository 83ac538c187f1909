"""The base class of adapter forms, and the emitters that run or record a form's operators."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Node

aten = torch.ops.aten

#: What a form computes with: an fx node when a graph is rewritten, a tensor when operators run eagerly.
Value = Any


class Call(Protocol):
    """A call of an operator on a weight, for which an adapter computes an update; fx nodes have this interface."""

    @property
    def target(self) -> Any:
        """The operator."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Its positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Its keyword arguments."""


@dataclasses.dataclass(frozen=True)
class OperatorCall:
    """A call of an operator that runs eagerly.

    Attributes:
        target: the operator.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> torch.Tensor:
        """Run the operator."""
        result: torch.Tensor = self.target(*self.args, **self.kwargs)
        return result


class Emitter(Protocol):
    """Takes operators one after another, and runs them or appends them to a graph."""

    def emit(self, target: Any, *args: Any) -> Value:
        """The result of ``target(*args)``, as a tensor or as a node."""


class TensorEmitter:
    """Runs each operator eagerly."""

    def emit(self, target: Any, *args: Any) -> torch.Tensor:
        """Run ``target(*args)``."""
        result: torch.Tensor = target(*args)
        return result


@dataclasses.dataclass
class NodeEmitter:
    """Appends ``call_function`` nodes after a node and tags each with its site.

    Attributes:
        after: the node after which the next one is inserted; updated at each insertion.
        site: the site's name, for ``meta["adapter_site"]``.
        emitted: the inserted nodes, first to last.
    """

    after: Value
    site: str
    emitted: list[Node] = dataclasses.field(default_factory=list)

    def emit(self, target: Any, *args: Any) -> Value:
        """Insert ``target(*args)`` and return its node."""
        graph = self.after.graph
        with graph.inserting_after(self.after):
            node = graph.call_function(target, args)
        node.meta["adapter_site"] = self.site
        self.after = node
        self.emitted.append(node)
        return node


class AdapterForm(abc.ABC):
    """What an adapter computes. Forms have no state and no parameters.

    A form defines its update on activations, for each kind of use, and on the weight, and all must agree:
    ``emit_activation`` gives x ΔWᵀ, which is added to the output; ``emit_weight`` gives ΔW, which is added to the
    weight. A form that also scales the rows of the sum, W' = c ∘ (W + ΔW), has :attr:`rescales` and gives c.

    Attributes:
        name: its name in configurations, plans and files; :func:`passes.forms.find_form` finds the form by it.
    """

    name: str

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are stored but not trained."""
        return frozenset()

    @property
    def rescales(self) -> bool:
        """Whether W' = c ∘ (W + ΔW) by rows, which is not the sum of W and a low-rank matrix."""
        return False

    @property
    def is_routed(self) -> bool:
        """Whether the update depends on the call and is no matrix (:mod:`passes.forms.routed`)."""
        return False

    @property
    def groups(self) -> int:
        """The number of groups of equal size that the triplets are in; the rank is a multiple of it."""
        return 1

    @property
    def core(self) -> AdapterForm:
        """The form without the starting values that an initializer added to it."""
        return self

    def is_empty(self, rank: int) -> bool:
        """Whether an adapter of this rank does not change the weight, for any values of its parameters."""
        return rank == 0

    @abc.abstractmethod
    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, for ΔW of shape [out_features, in_features]."""

    @abc.abstractmethod
    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """Emit x ΔWᵀ, [..., out], for x [..., in]; or x ΔW, [..., in], for x [..., out] if ``reverse``."""

    @abc.abstractmethod
    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """Emit the rows of ΔW that ``lookup``, an ``aten.embedding`` of the weight, looks up."""

    @abc.abstractmethod
    def emit_convolution(
        self,
        emitter: Emitter,
        convolution: Call,
        x: Value,
        parameters: Mapping[str, Value],
        scale: float,
        kernel: Sequence[int],
    ) -> Value:
        """Emit the ``convolution`` of x with ΔW in place of the weight of shape ``kernel``, without a bias."""

    @abc.abstractmethod
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
        """Emit the ``product`` (``bmm``, ``matmul``) of x with the matrices of ΔW in place of the weight's.

        The weight has the shape ``stack``; ``product`` is x Wₑ if ``reverse``, else x Wₑᵀ.
        """

    @abc.abstractmethod
    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """Emit ΔW, [out, in]."""

    @abc.abstractmethod
    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """ΔW as a new tensor, [out, in], in the dtype of the parameters; callers may write into it."""

    def emit_factor(self, emitter: Emitter, weight: Value, parameters: Mapping[str, Value], scale: float) -> Value:
        """Emit c, [out], given W as [out, in] in the parameters' dtype.

        Raises:
            NotImplementedError: the form does not rescale, see :attr:`rescales`.
        """
        raise NotImplementedError(f"the form {self.name} does not rescale")

    def factor(self, total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """c, [out], given ``total`` = W + ΔW as [out, in].

        Raises:
            NotImplementedError: the form does not rescale, see :attr:`rescales`.
        """
        raise NotImplementedError(f"the form {self.name} does not rescale")
