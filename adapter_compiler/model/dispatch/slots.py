"""What stands at an adapted weight: its adapters and where their parameters are."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from adapter_compiler.errors import SiteError
from adapter_compiler.model.dispatch.scope import Token, is_exchanged_in_call, is_visible
from passes.adapt.apply_adapters import BoundAdapter
from passes.planning.plan import PlannedAdapter

#: Where a module keeps its slots, by the name of the parameter.
SLOTS = "_adapted_weights"


@dataclasses.dataclass(frozen=True)
class HeldAdapter:
    """An adapter and the module that holds its parameters, in which they may be exchanged at any time."""

    planned: PlannedAdapter
    holder: nn.Module
    names: tuple[str, ...]

    def bind(self) -> BoundAdapter:
        """The adapter with the tensors that are its parameters now."""
        registered = self.holder._parameters
        return BoundAdapter(self.planned, {name: registered[name] for name in self.names})  # type: ignore[misc]


@dataclasses.dataclass(frozen=True)
class Slot:
    """An adapted weight at one of its names.

    Attributes:
        token: the model's.
        weight: the weight's first qualified name.
        shape: its shape.
        adapters: those that stand at it.
        fused: whether functions with a backward of their own may be used.
        recompute: whether these may compute cheap activations again in backward.
        is_summed_without_grad: the module must get plain tensors where gradients are off: it hands its weights to C++
            then, and chooses its way by them.
    """

    token: Token
    weight: str
    shape: tuple[int, ...]
    adapters: tuple[HeldAdapter, ...]
    fused: bool = True
    recompute: bool = True
    is_summed_without_grad: bool = False

    def bind(self, module: nn.Module, leaf: str, weight: torch.Tensor) -> tuple[BoundAdapter, ...] | None:
        """The adapters as they are now; ``None`` if they are not to be added.

        They are not where this thread does not see them, and to a tensor that the model's own code puts into the
        parameter's place for a call inside a call (``torch.func.functional_call``): it was computed from W + ΔW.

        Args:
            module: the module that holds the weight.
            leaf: the parameter's name in it.
            weight: what stands there now.

        Raises:
            SiteError: a weight of another shape stands here by now.
        """
        if not is_visible(self.token):
            return None
        if not isinstance(weight, nn.Parameter) and is_exchanged_in_call(self.token, module, leaf):
            return None
        if weight.shape != self.shape:
            raise SiteError(
                f"{self.weight} has the shape {tuple(weight.shape)} by now, expected {self.shape}, for which its "
                "adapter was made; compile the changed model again"
            )
        if self.token.noted is not None:
            self.token.noted.add(self.weight)
        return tuple([adapter.bind() for adapter in self.adapters])


def read_registered(module: nn.Module, leaf: str) -> torch.Tensor | None:
    """What is registered as a parameter, or computed into an attribute in its place.

    Raises:
        AttributeError: there is neither.
    """
    if leaf in module._parameters:
        return module._parameters[leaf]
    if leaf in module.__dict__:
        value: torch.Tensor | None = module.__dict__[leaf]
        return value
    if leaf in module._buffers:
        return module._buffers[leaf]
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {leaf!r}")
