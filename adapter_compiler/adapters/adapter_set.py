"""Which adapters a model has by name, and what inactive ones keep of the model's own tensors."""

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
    """Values of parameters and buffers of the model that belong to a inactive adapter, as buffers of the same names."""

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
    """The adapters of a model but the one called ``default``, by name, and the tensors of those that rest.

    Attributes:
        active: the name of the active adapter.
        plans: the plan of every adapter, ``default`` among them.
        stores: parameters by name, ``default`` apart: the model itself holds that as ``adapters``.
        inactive: by name, what inactive adapters keep of the model's own tensors.
    """

    def __init__(self, plan: AdapterPlan) -> None:
        """The set of a model that was just compiled with ``plan``."""
        super().__init__()
        self.active = FIRST_NAME
        self.plans = {FIRST_NAME: plan}
        self.added = nn.Module()
        self.inactive = nn.Module()

    def find_inactive(self, name: str) -> dict[str, torch.Tensor] | None:
        """What ``name`` keeps of the model's own tensors; ``None`` if it is active and they are in the model."""
        kept = self.inactive._modules.get(name)
        return kept.tensors if isinstance(kept, InactiveTensors) else None

    def assert_known(self, name: str) -> None:
        """Raise :class:`ConfigError` unless there is an adapter of this name."""
        if name not in self.plans:
            known = ", ".join(map(repr, self.plans))
            raise ConfigError(f"there is no adapter {name!r}, expected one of {known}; add_adapter or load_adapter it")

    def assert_free(self, name: object) -> None:
        """Raise :class:`ConfigError` unless an adapter may be called this."""
        if not isinstance(name, str) or not name or "." in name or "/" in name:
            raise ConfigError(
                f"{name!r} cannot name an adapter, expected text without '.' and '/'; choose another name, as in 'task'"
            )
        if name in self.plans:
            raise ConfigError(
                f"there is an adapter {name!r} already, expected a new name; choose another or call "
                f"remove_adapter({name!r}) first"
            )
