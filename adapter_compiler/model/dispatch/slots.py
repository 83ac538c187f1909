"""A slot holds the adapters of one weight, and finds the tensors that are their parameters now."""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from adapter_compiler.adapters.parameters.sharded import is_sharded
from adapter_compiler.errors import SiteError
from adapter_compiler.model.dispatch.hooks import WeightHooks
from adapter_compiler.model.dispatch.scope import Token, is_replaced_in_call, is_visible
from passes.adapt.apply_adapters import BoundAdapter
from passes.planning.plan import PlannedAdapter

#: The attribute in which a module keeps its slots, by the name of the weight.
SLOTS = "_adapter_compiler_slots"


@dataclasses.dataclass(frozen=True)
class RoutedAdapter(BoundAdapter):
    """An adapter whose update depends on the call, bound to a read of its weight.

    Attributes:
        token: the model's token, under which gates and masks of a call are kept.
        is_followed: whether other sites use its gates.
    """

    token: Token
    is_followed: bool


@dataclasses.dataclass(frozen=True)
class AttachedAdapter:
    """An adapter and the module that has its parameters, which may be replaced at any time.

    Attributes:
        planned: the adapter.
        owner: the module that has its parameters.
        names: the names of the parameters.
        routing: the model's token if the update depends on the call, else ``None``.
        is_followed: whether other sites use its gates.
    """

    planned: PlannedAdapter
    owner: nn.Module
    names: tuple[str, ...]
    routing: Token | None = None
    is_followed: bool = False

    def bind(self) -> BoundAdapter:
        """The adapter with the tensors that are its parameters now."""
        registered = self.owner._parameters
        parameters: dict[str, torch.Tensor] = {name: registered[name] for name in self.names}  # type: ignore[misc]
        if self.routing is not None:
            return RoutedAdapter(self.planned, parameters, self.routing, self.is_followed)
        return BoundAdapter(self.planned, parameters)


@dataclasses.dataclass(frozen=True)
class Slot:
    """The adapters of a weight, at one of the weight's names.

    Attributes:
        token: the model's token.
        weight: the weight's first qualified name.
        shape: its shape.
        adapters: its adapters.
        hooks: what users registered on the gradient of W + ΔW; all names of the weight share it.
        fused: whether an adapter and its base layer may run as one function with its own backward.
        recompute: whether these functions may recompute cheap activations in backward.
        is_routed: whether an update depends on the call, so that W + ΔW does not exist.
        is_summed_without_grad: whether a read must give W + ΔW as a plain tensor if it needs no gradient, because the
            module then checks its weights and passes them to C++.
    """

    token: Token
    weight: str
    shape: tuple[int, ...]
    adapters: tuple[AttachedAdapter, ...]
    hooks: WeightHooks
    fused: bool = True
    recompute: bool = True
    is_summed_without_grad: bool = False
    is_routed: bool = False

    def bind(self, module: nn.Module, leaf: str, weight: torch.Tensor) -> tuple[BoundAdapter, ...] | None:
        """The adapters with their present parameters, or ``None`` if no ΔW is to be added.

        That is so if this thread does not see the adapters, and for a tensor by which the model's own code replaces the
        parameter during a call (``torch.func.functional_call``): it was computed from W + ΔW.

        Args:
            module: the module that has the weight.
            leaf: the parameter's name in it.
            weight: the present value of the parameter.

        Raises:
            SiteError: the weight now has another shape.
        """
        if not is_visible(self.token):
            return None
        if not isinstance(weight, nn.Parameter) and is_replaced_in_call(self.token, module, leaf):
            return None
        if weight.shape != self.shape:
            advice = "compile the changed model again"
            if weight.dim() == 1:  # what FullyShardedDataParallel makes of every parameter
                advice += ", or use shard(adapted) in place of FullyShardedDataParallel, which flattens weights"
            raise SiteError(
                f"{self.weight} now has the shape {tuple(weight.shape)}, expected {self.shape}, for which its adapter "
                f"was made; {advice}"
            )
        if self.token.used is not None:
            self.token.used.add(self.weight)
        return tuple([adapter.bind() for adapter in self.adapters])


def assert_gathered(weight: torch.Tensor, name: str) -> None:
    """Raise :class:`SiteError` if W is a DTensor where something computes with W + ΔW.

    FSDP2 puts a plain parameter in its place while the module that it shards runs.
    """
    if type(weight) is not nn.Parameter and is_sharded(weight):
        raise SiteError(
            f"{name} is a DTensor where it is used, expected a parameter that is whole. Under shard(adapted), call the "
            "adapted model or a submodule that is sharded as one block; an adapted weight cannot be tensor parallel "
            "(parallelize_module): leave it out of that plan, or exclude it from the sites"
        )


def read_registered(module: nn.Module, leaf: str) -> torch.Tensor | None:
    """The parameter of this name, or the attribute or buffer of this name if there is no parameter.

    Raises:
        AttributeError: there is none of them.
    """
    if leaf in module._parameters:
        return module._parameters[leaf]
    if leaf in module.__dict__:
        value: torch.Tensor | None = module.__dict__[leaf]
        return value
    if leaf in module._buffers:
        return module._buffers[leaf]
    raise AttributeError(f"{type(module).__name__!r} object has no attribute {leaf!r}")
