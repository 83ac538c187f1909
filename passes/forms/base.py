"""The contract of an adapter form, and the emitter it writes its nodes with."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch.fx import Node

aten = torch.ops.aten

#: What a form computes with: an fx node where a graph is rewritten, a tensor where operators run at once.
Value = Any


class Call(Protocol):
    """A call of an operator on a weight, as an adapter beside it sees it; an fx node is one."""

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
    """A call that runs at once.

    Attributes:
        target: the operator.
        args: its positional arguments.
        kwargs: its keyword arguments.
    """

    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def run(self) -> torch.Tensor:
        """What the operator returns."""
        result: torch.Tensor = self.target(*self.args, **self.kwargs)
        return result


class Emitter(Protocol):
    """Computes one operator after another, now or in a graph."""

    def emit(self, target: Any, *args: Any) -> Value:
        """The value of ``target(*args)``."""


class TensorEmitter:
    """Runs each operator at once."""

    def emit(self, target: Any, *args: Any) -> torch.Tensor:
        """What ``target(*args)`` returns."""
        result: torch.Tensor = target(*args)
        return result


@dataclasses.dataclass
class NodeEmitter:
    """Appends ``call_function`` nodes after a node and tags each with the site it belongs to.

    Attributes:
        after: the node behind which the next one goes; moves along.
        site: the tag.
        emitted: the nodes so far, first to last.
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
    """What an adapter computes. Forms hold no state and no parameters.

    A form is written on activations, for each kind of use, and on the weight, and all must agree:
    ``emit_activation`` gives x ΔWᵀ, to be added to the output, ``emit_weight`` ΔW, to be added to the weight.
    A form that also scales the rows of the result, W' = c ∘ (W + ΔW), says so with :attr:`rescales` and gives c.

    Attributes:
        name: how configurations, plans and files call it; :func:`passes.forms.find_form` gives the form back.
    """

    name: str

    @property
    def frozen(self) -> frozenset[str]:
        """Names of the parameters that are kept but do not train."""
        return frozenset()

    @property
    def rescales(self) -> bool:
        """Whether the adapted weight is c ∘ (W + ΔW) by rows, so that it is no sum of W and a low-rank matrix."""
        return False

    @property
    def core(self) -> AdapterForm:
        """The form without what an initializer has added to it."""
        return self

    def is_empty(self, rank: int) -> bool:
        """Whether an adapter of this rank leaves the weight as it is, whatever its parameters are."""
        return rank == 0

    @abc.abstractmethod
    def parameter_shapes(self, out_features: int, in_features: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, for ΔW of shape [out_features, in_features]."""

    @abc.abstractmethod
    def emit_activation(
        self, emitter: Emitter, x: Value, parameters: Mapping[str, Value], scale: float, *, reverse: bool
    ) -> Value:
        """Nodes for x ΔWᵀ, or for x ΔW if ``reverse``; x is [..., in] (or [..., out])."""

    @abc.abstractmethod
    def emit_lookup(self, emitter: Emitter, lookup: Call, parameters: Mapping[str, Value], scale: float) -> Value:
        """Nodes for the rows of ΔW that ``lookup``, an ``aten.embedding`` of the weight, looks up."""

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
        """Nodes for ``convolution`` of x with ΔW in place of the weight of shape ``kernel``, without its bias."""

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
        """Nodes for ``product`` (``bmm``, ``matmul``) of x with the matrices of ΔW in place of the weight's.

        The weight has the shape ``stack``; ``product`` is x Wₑ if ``reverse``, else x Wₑᵀ.
        """

    @abc.abstractmethod
    def emit_weight(self, emitter: Emitter, parameters: Mapping[str, Value], scale: float) -> Value:
        """Nodes for ΔW, [out, in]."""

    @abc.abstractmethod
    def delta(self, parameters: Mapping[str, torch.Tensor], scale: float) -> torch.Tensor:
        """ΔW as a new tensor, [out, in], in the dtype of the parameters; the caller may write into it."""

    def emit_factor(self, emitter: Emitter, weight: Value, parameters: Mapping[str, Value], scale: float) -> Value:
        """Where the form :attr:`rescales`: nodes for c, [out], given W as [out, in] in the parameters' dtype."""
        raise NotImplementedError(f"the form {self.name} does not rescale")

    def factor(self, total: torch.Tensor, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Where the form :attr:`rescales`: c, [out], given W + ΔW as [out, in]."""
        raise NotImplementedError(f"the form {self.name} does not rescale")
