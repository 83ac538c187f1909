"""The parameters of one adapter, as views into a few flat buffers.

Users and optimizers see ordinary named Parameters. Because they are contiguous in memory, scores, the regularizer and
masking run as a few kernels, however many sites there are. If another library replaces a parameter's memory (FSDP,
offloading), only this speed is lost: :attr:`AdapterParameters.flat` is then ``None``, and each parameter is processed
separately.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import nn

from adapter_compiler.adapters.parameters.flat_buffers import FlatLayout, Key, plan_layout
from adapter_compiler.adapters.parameters.separate_storage import separate_storage
from passes.base import make_containers
from passes.planning.plan import AdapterPlan, PlannedAdapter

Self = TypeVar("Self", bound="AdapterParameters")

#: The two families of parameters: those of triplets, which a rank budget can prune, and all others.
TRIPLETS, OTHERS = "triplets", "others"

_TRIPLET_NAMES = {"P", "lam", "Q"}
_DERIVED = ("_layout", "_flat_buffers", "_pointers", "_owners")


class AdapterParameters(nn.Module):
    """The parameters of each planned adapter, named ``<weight's name>.<parameter>``.

    The nesting is that of the model, so a state-dict key is, for example, ``encoder.0.query.weight.P``. ``.to()`` and
    :meth:`resize` keep the Parameter objects, so optimizers keep working.
    """

    def __init__(self, plan: AdapterPlan, devices: Mapping[str, torch.device]) -> None:
        """Allocate the parameters as zeros.

        Args:
            plan: the adapters.
            devices: the device of each weight, by its first qualified name.
        """
        super().__init__()
        self._names: dict[str, tuple[str, ...]] = {}
        for adapter in plan:
            self._register(adapter, devices[adapter.site.weight])
        self._flatten()

    @torch.no_grad()
    def adopt(self, plan: AdapterPlan) -> None:
        """Change to the parameters that another plan for the same sites needs.

        Parameters that both plans have stay the same objects and, where the shapes agree, keep their values. New
        parameters are zero.
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
        """Create the missing parameters of one adapter as zeros."""
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
        """The family of each parameter: :data:`TRIPLETS`, which a rank budget can prune, or :data:`OTHERS`."""
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
        """The layout and the flat buffers of values; ``None`` if a parameter is no longer a view of them."""
        for (key, owner), pointer in zip(self._owners, self._pointers, strict=True):
            parameter = owner._parameters[key[1]]
            if type(parameter) is not nn.Parameter or parameter.data_ptr() != pointer:
                return None
        return self._layout, self._flat_buffers

    @torch.no_grad()
    def resize(self, values: Mapping[Key, torch.Tensor]) -> None:
        """Give parameters new values, which may have other shapes; their gradients become ``None``.

        Args:
            values: the new values by site and parameter name; other parameters do not change.
        """
        parameters = self.keyed_parameters
        for key, value in values.items():
            parameter = parameters[key]
            parameter.grad = None
            # Autograd remembers the shape for graphs that still exist, and forgets it when the dtype changes.
            parameter.data = torch.empty(0, dtype=torch.int8 if value.is_complex() else torch.complex64)
            parameter.data = value.to(value.dtype)
        self._flatten()

    @torch.no_grad()
    def _flatten(self) -> None:
        """Move all values into flat buffers, and make the parameters views of these."""
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

    def assign_gradient_flags(self, planned: Iterable[PlannedAdapter]) -> None:
        """Let the parameters of these adapters require grad if their form trains them and they are not empty.

        DistributedDataParallel waits for the gradients of all parameters that require grad, so empty ones must not.
        """
        for adapter in planned:
            for name, parameter in self.parameters_of(adapter).items():
                parameter.requires_grad_(parameter.numel() > 0 and name not in adapter.form.frozen)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state dict, in which each tensor shares memory with its parameter but has a separate storage.

        Libraries that write safetensors (Accelerate, Trainer, ``safetensors.torch.save_model``) treat tensors with one
        storage as tied weights, and write only one of them.
        """
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name, _ in self.named_parameters(remove_duplicate=False):
            if (key := prefix + name) in found:
                found[key] = separate_storage(found[key])
        return found

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``.to()``, ``.cuda()``, ``.double()``…: torch moves each parameter separately, so they are joined again."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._flatten()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the flat buffers, so that copies and pickles hold each value once."""
        return {k: v for k, v in self.__dict__.items() if k not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Join the copied parameters."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._flatten()
