"""The adapters' parameters: one set that all captured graphs share, views into a few flat buffers.

Users and optimizers see ordinary named Parameters. That they are neighbors in memory lets scores, the
regularizer and masking run as a handful of kernels however many sites there are. Whatever replaces a
parameter's memory from outside (FSDP, an offloading library) only costs that: :attr:`AdapterParameters.flat`
then says ``None``, and each parameter is worked on by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from adapter_compiler.adapters.parameters.flat_buffers import FlatLayout, Key, plan_layout
from passes.base import make_containers
from passes.planning.plan import AdapterPlan, PlannedAdapter

Self = TypeVar("Self", bound="AdapterParameters")

#: The family of parameters that make up triplets, which a rank budget can prune, and that of all others.
TRIPLETS, OTHERS = "triplets", "others"

_TRIPLET_NAMES = {"P", "lam", "Q"}
_DERIVED = ("_layout", "_flat_buffers", "_pointers", "_owners")


class AdapterParameters(nn.Module):
    """Holds the parameters of each planned adapter under ``<weight's name>.<parameter>``.

    The nesting repeats the model's, so state-dict keys read ``encoder.0.query.weight.P``. A parameter
    keeps its identity through ``.to()``, copies and :meth:`resize`, so optimizers keep theirs.
    """

    def __init__(self, plan: AdapterPlan, devices: Mapping[str, torch.device]) -> None:
        """Allocate the parameters, zeros, on the device of each weight."""
        super().__init__()
        self._names: dict[str, tuple[str, ...]] = {}
        for adapter in plan:
            self._register(adapter, devices[adapter.site.weight])
        self._flatten()

    @torch.no_grad()
    def adopt(self, plan: AdapterPlan) -> None:
        """Hold what the forms of another plan for the same sites need.

        Parameters that both have keep their identity and, where the shapes agree, their values; new ones are zero.
        """
        mine = self.keyed_parameters
        resized: dict[Key, torch.Tensor] = {}
        for adapter in plan:
            site = adapter.site.name
            for name in set(self._names[site]) - adapter.parameter_shapes.keys():
                delattr(self.get_submodule(site), name)
            for name, shape in adapter.parameter_shapes.items():
                if (site, name) in mine and mine[site, name].shape != shape:
                    resized[site, name] = mine[site, name].new_zeros(shape)
            self._register(adapter, mine[site, self._names[site][0]].device)
        self._flatten()
        self.resize(resized)

    def _register(self, adapter: PlannedAdapter, device: torch.device) -> None:
        """Make the parameters of one adapter that are not there yet, zeros."""
        owner = make_containers(self, adapter.site.name)
        for name, shape in adapter.parameter_shapes.items():
            if owner._parameters.get(name) is None:
                values = torch.zeros(shape, dtype=adapter.dtype, device=device)
                trains = name not in adapter.form.frozen
                owner.register_parameter(name, nn.Parameter(values, requires_grad=trains))
        self._names[adapter.site.name] = tuple(adapter.parameter_shapes)

    def parameters_of(self, adapter: PlannedAdapter) -> dict[str, nn.Parameter]:
        """The parameters of one adapter by name."""
        owner = self.get_submodule(adapter.site.name)
        return {name: owner.get_parameter(name) for name in adapter.parameter_shapes}

    @property
    def keyed_parameters(self) -> dict[Key, nn.Parameter]:
        """Every parameter by site and name, in the plan's order."""
        return {key: owner._parameters[key[1]] for key, owner in self._owners}  # type: ignore[misc]

    @property
    def families(self) -> dict[Key, str]:
        """By parameter, whether it is part of triplets that a rank budget can prune."""
        return {
            (site, name): TRIPLETS if name in _TRIPLET_NAMES <= set(names) else OTHERS
            for site, names in self._names.items()
            for name in names
        }

    @property
    def prunable_sites(self) -> tuple[str, ...]:
        """The sites that have triplets."""
        return tuple(site for site, names in self._names.items() if set(names) >= _TRIPLET_NAMES)

    @property
    def flat(self) -> tuple[FlatLayout, list[torch.Tensor]] | None:
        """The layout and the flat buffers of values, or ``None`` if a parameter is not a view of them any more."""
        for (key, owner), pointer in zip(self._owners, self._pointers, strict=True):
            parameter = owner._parameters[key[1]]
            if type(parameter) is not nn.Parameter or parameter.data_ptr() != pointer:
                return None
        return self._layout, self._flat_buffers

    @torch.no_grad()
    def resize(self, values: Mapping[Key, torch.Tensor]) -> None:
        """Give parameters new values, possibly of other shapes; gradients go.

        Args:
            values: by site and name; what is not named stays.
        """
        parameters = self.keyed_parameters
        for key, value in values.items():
            parameter = parameters[key]
            parameter.grad = None
            # Autograd keeps the old shape for a live graph's sake; it forgets it when the dtype changes.
            parameter.data = torch.empty(0, dtype=torch.int8 if value.is_complex() else torch.complex64)
            parameter.data = value.to(value.dtype)
        self._flatten()

    @torch.no_grad()
    def _flatten(self) -> None:
        """Move all values into flat buffers and let the parameters be views of them."""
        self._owners = [
            ((site, name), self.get_submodule(site)) for site, names in self._names.items() for name in names
        ]
        parameters = self.keyed_parameters
        self._pointers = [-1] * len(parameters)
        if any(type(parameter) is not nn.Parameter for parameter in parameters.values()):
            return
        self._layout = plan_layout(parameters, self.families)
        self._flat_buffers = self._layout.allocate()
        views = self._layout.views(self._flat_buffers)
        for key, parameter in parameters.items():
            views[key].copy_(parameter)
            parameter.data = views[key]
        self._pointers = [parameter.data_ptr() for parameter in parameters.values()]

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``.to()``, ``.cuda()``, ``.double()``…: torch moves each parameter alone, so they are joined again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._flatten()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold the parameters once."""
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Join the copied parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flatten()
