"""The named adapters of a model, and the copies of model tensors that inactive adapters keep."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from adapter_compiler.errors import ConfigError
from passes.base import make_containers
from passes.planning.plan import AdapterPlan

#: Name of the adapter that a model is compiled with.
FIRST_NAME = "default"


class InactiveTensors(nn.Module):
    """The values that an inactive adapter keeps of the model's parameters and buffers, as buffers of the same names."""

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Copy the tensors."""
        super().__init__()
        for name, tensor in tensors.items():
            path, _, leaf = name.rpartition(".")
            owner = make_containers(self, path)
            owner.register_buffer(leaf, tensor.detach().clone())

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The values by name."""
        return dict(self.named_buffers())


class AdapterSet(nn.Module):
    """The adapters that were added to a model, by name, and the model tensors that inactive adapters keep.

    Attributes:
        active: the name of the active adapter.
        plans: the plan of every adapter by name, including ``default``.
        initial_plans: the plan that an adapter had before its ranks first changed; only for adapters whose ranks did.
        added: one child module of adapter parameters for each added adapter, by name. The parameters of ``default``
            are not here: the model holds them as ``adapters``.
        inactive: one :class:`InactiveTensors` for each inactive adapter, by name.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        """Start with one adapter, ``default``, which is active."""
        super().__init__()
        self.active = FIRST_NAME
        self.plans = {FIRST_NAME: plan}
        self.initial_plans: dict[str, AdapterPlan] = {}
        self.added = nn.Module()
        self.inactive = nn.Module()

    def find_inactive(self, name: str) -> dict[str, torch.Tensor] | None:
        """The model tensors that ``name`` keeps; ``None`` if it is active, because then the model itself has them."""
        kept = self.inactive._modules.get(name)
        return kept.tensors if isinstance(kept, InactiveTensors) else None

    def initial_plan(self, name: str) -> AdapterPlan:
        """The plan of an adapter with its initial ranks."""
        return self.initial_plans.get(name, self.plans[name])

    def assert_known(self, name: str) -> None:
        """Raise :class:`ConfigError` unless there is an adapter of this name."""
        if name not in self.plans:
            known = ", ".join(map(repr, self.plans))
            raise ConfigError(f"there is no adapter {name!r}, expected one of {known}; add_adapter or load_adapter it")

    def assert_free(self, name: object) -> None:
        """Raise :class:`ConfigError` unless ``name`` is valid and not taken."""
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise ConfigError(
                f"{name!r} cannot name an adapter, expected text without '.' and '/'; choose another name, as in 'task'"
            )
        if name in self.plans:
            raise ConfigError(
                f"there is an adapter {name!r} already, expected a new name; choose another or call "
                f"remove_adapter({name!r}) first"
            )
