"""The data of an adapted model: the user's module, its named adapters and the reports about them."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from adapter_compiler.adapters.adapter_set import FIRST_NAME, AdapterSet
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.parameters.checksum import compute_checksum
from adapter_compiler.adapters.parameters.match_ranks import match_ranks
from adapter_compiler.adapters.reports import FoldReport, QuantizationReport
from adapter_compiler.config.adapter_config import AdapterConfig
from passes.analysis.weight_uses import find_parameter_aliases
from passes.planning.find_sites import SiteSearch
from passes.planning.plan import AdapterPlan
from passes.planning.site import AdapterSite
from passes.quantize.packed_state import gather_packed, spread_packed
from passes.quantize.packed_weights import read_parameter, set_parameter


class FollowsRanks(Protocol):
    """An object with data about each triplet, such as a rank budget."""

    def follow_ranks(self) -> None:
        """Adjust to the new ranks of the adapters."""


def checksum_buffers(buffers: Iterable[tuple[str, torch.Tensor]]) -> dict[str, str]:
    """A checksum of each buffer that has values in this process, by name."""
    found = {}
    for name, buffer in buffers:
        if type(buffer) is torch.Tensor and not buffer.is_meta and buffer.layout is torch.strided:
            found[name] = f"{buffer.dtype} {compute_checksum(buffer)}"
    return found


class AdapterState(nn.Module):
    """The user's module, its adapters by name, and what is known about both.

    Code that saves, combines, compacts, quantizes or reports takes this class. Its only subclass,
    :class:`~adapter_compiler.model.adapted_model.AdaptedModel`, adds how a call computes with W + ΔW.

    State-dict keys: the first adapter is under ``adapters``, the others are under ``adapter_set.added.<name>``,
    whichever is active. Fully trained parameters and persistent buffers of inactive adapters are under
    ``adapter_set.inactive.<name>``.

    Attributes:
        module: the user's module; its parameters are the plain weights.
        adapter_set: the added adapters, and which adapter is active.
        options: the options that the model was compiled with.
        rejected: why each weight without an adapter has none, by name.
        unadapted_sites: the weights without an adapter that could have one.
        unused: the weights with an adapter that the first call did not use.
        fold_report: rounding errors of the last ``fold``.
        quantization_report: what was quantized, with its errors and the memory before and after.
        initial_buffers: a checksum of each buffer as it was when the model was compiled.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        plan: AdapterPlan,
        adapter_parameters: AdapterParameters,
        options: AdapterConfig,
        search: SiteSearch,
    ) -> None:
        """Hold one adapter, which is active."""
        super().__init__()
        self.module = module
        self._modules["adapters"] = adapter_parameters  # the attribute of this name is the active adapter
        self.adapter_set = AdapterSet(plan)
        self.options = options
        self.rejected: Mapping[str, str] = search.rejected
        self.unadapted_sites = search.others
        self.unused: tuple[str, ...] = ()
        self.fold_report: FoldReport | None = None
        self.quantization_report: QuantizationReport | None = None
        self.initial_buffers = checksum_buffers(module.named_buffers())
        self._followers: weakref.WeakSet[FollowsRanks] = weakref.WeakSet()

    @property
    def adapters(self) -> AdapterParameters:
        """The active adapter's parameters, ``<weight's name>.{P, lam, Q}``."""
        return self.parameters_of_adapter(self.active_adapter)

    @property
    def plan(self) -> AdapterPlan:
        """The active adapter's plan: form, rank and scale for each site."""
        return self.adapter_set.plans[self.active_adapter]

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that calls run with; ``"default"`` is the one the model was compiled with."""
        return self.adapter_set.active

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they were added."""
        return tuple(self.adapter_set.plans)

    def parameters_of_adapter(self, name: str) -> AdapterParameters:
        """The parameters of the adapter of this name."""
        self.adapter_set.assert_known(name)
        adapter_parameters = self._modules["adapters"] if name == FIRST_NAME else self.adapter_set.added._modules[name]
        assert isinstance(adapter_parameters, AdapterParameters)
        return adapter_parameters

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """The adapted weights in model order; each has a ``name``, the weight's qualified name."""
        return tuple(adapter.site for adapter in self.plan)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, then those that ``AdapterConfig(trainable=...)`` names."""
        return [p for p in (*self.adapters.parameters(), *self.module.parameters()) if p.requires_grad]

    def base_weight(self, name: str) -> nn.Parameter:
        """The frozen weight W with this qualified name (the module's attribute of this name reads as W + ΔW)."""
        return read_parameter(self.module, name)

    def replace_weights(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Replace frozen weights by packed ones.

        Args:
            weights: the packed weights by the first qualified name of the weight.
        """
        for name, first in find_parameter_aliases(self.module).items():
            if first in weights:
                set_parameter(self.module, name, weights[first])

    def rebuild(self, plan: AdapterPlan, adapter_parameters: AdapterParameters | None = None) -> None:
        """Let the active adapter have another plan.

        Args:
            plan: adapters for the same sites or for some of them, with any ranks.
            adapter_parameters: their parameters; by default the present ones.
        """
        own = self.adapter_set
        own.initial_plans.setdefault(own.active, own.plans[own.active])
        own.plans[own.active] = plan
        if adapter_parameters is not None and self.active_adapter == FIRST_NAME:
            self._modules["adapters"] = adapter_parameters
        elif adapter_parameters is not None:
            self.adapter_set.added._modules[self.active_adapter] = adapter_parameters

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state dict, in a form that every saver can write.

        Further names of tied parameters have copies, and packed weights are the tensors of their code.
        """
        found: dict[str, Any] = super().state_dict(*args, **kwargs)
        keep_vars = args[2] if len(args) > 2 else kwargs.get("keep_vars", False)
        prefix = args[1] if len(args) > 1 else kwargs.get("prefix", "")
        for name, first in () if keep_vars else find_parameter_aliases(self.module).items():
            key = f"{prefix}module.{name}"
            if name != first and type(found.get(key)) is torch.Tensor:
                found[key] = found[key].clone()
        if not keep_vars:
            spread_packed(self.module, found, f"{prefix}module.")
        return found

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Give each adapter the ranks of the state dict before its values are loaded, and pack what was packed."""
        error_messages: list[str] = args[-1]
        error_messages += gather_packed(self.module, state_dict, f"{prefix}module.")
        for name in self.adapter_names:
            path = "adapters." if name == FIRST_NAME else f"adapter_set.added.{name}."
            initial = self.adapter_set.initial_plan(name)
            plan = match_ranks(self.adapter_set.plans[name], initial, state_dict, prefix + path)
            if plan is not None:
                self.change_ranks(name, plan)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def change_ranks(self, name: str, plan: AdapterPlan) -> None:
        """Change the ranks and starts of an adapter; parameters whose shape changes become zero."""
        if plan == self.adapter_set.plans[name]:
            return
        own, adapter_parameters = self.adapter_set, self.parameters_of_adapter(name)
        pairs = list(zip(own.plans[name], plan, strict=True))
        adapter_parameters.adopt(plan)
        if name == own.active:
            adapter_parameters.assign_gradient_flags(new for old, new in pairs if 0 in (old.rank, new.rank))
            self.rebuild(plan)
        else:
            own.initial_plans.setdefault(name, own.plans[name])
            own.plans[name] = plan
        for follower in list(self._followers):
            follower.follow_ranks()

    def add_follower(self, follower: FollowsRanks) -> None:
        """Call ``follower.follow_ranks()`` when loading a state dict changes ranks; copies of the model do not."""
        self._followers.add(follower)

    def find_followers(self) -> tuple[FollowsRanks, ...]:
        """The present followers, such as rank budgets."""
        return tuple(self._followers)

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the followers."""
        return {key: value for key, value in self.__dict__.items() if key != "_followers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._followers = weakref.WeakSet()
