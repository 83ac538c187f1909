"""The adapters of a model by name, and what else belongs to it: the data that an adapted model consists of."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from adapter_compiler.adapters.adapter_set import FIRST_NAME, AdapterSet
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.reports import FoldReport, QuantizationReport
from adapter_compiler.config.adapter_config import AdapterConfig
from passes.analysis.weight_uses import find_parameter_aliases
from passes.planning.find_sites import SiteSearch
from passes.planning.plan import AdapterPlan
from passes.planning.site import AdapterSite
from passes.quantize.packed_weights import read_parameter, set_parameter


class AdapterState(nn.Module):
    """The user's module, its adapters by name, and what is known of both.

    What saves, combines, compacts, quantizes and reports works on this. How a call gives W + ΔW is added by
    :class:`~adapter_compiler.model.adapted_model.AdaptedModel`, the one subclass.

    In the state dict the first adapter stands under ``adapters``, the others under ``adapter_set.added.<name>``,
    whichever is active; fully trained parameters and persistent buffers of inactive adapters under
    ``adapter_set.inactive.<name>``.

    Attributes:
        module: the user's module; its parameters are the plain weights.
        adapter_set: the adapters beside the first, and which one is active.
        options: the options it was compiled with.
        rejected: why each other weight carries no adapter, by name.
        unadapted_sites: those of the other weights that could carry one.
        unused: the weights with an adapter that the first call did not use.
        fold_report: rounding errors of the last ``fold``.
        quantization_report: what was quantized, with its errors and the memory before and after.
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

    @property
    def adapters(self) -> AdapterParameters:
        """The active adapter's parameters, ``<weight's name>.{P, lam, Q}``."""
        return self.parameters_of_adapter(self.active_adapter)

    @property
    def plan(self) -> AdapterPlan:
        """Which site has which adapter, in the active one."""
        return self.adapter_set.plans[self.active_adapter]

    @property
    def active_adapter(self) -> str:
        """The name of the adapter that calls run with; ``"default"`` is the one the model was compiled with."""
        return self.adapter_set.active

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """The names of all adapters, in the order in which they came."""
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
        """The frozen weight W with this qualified name, whose attribute reads as W + ΔW."""
        return read_parameter(self.module, name)

    def replace_weights(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put packed weights, by first name, in the place of the frozen ones."""
        for name, first in find_parameter_aliases(self.module).items():
            if first in weights:
                set_parameter(self.module, name, weights[first])

    def rebuild(self, plan: AdapterPlan, adapter_parameters: AdapterParameters | None = None) -> None:
        """Put the adapters of another plan at the weights.

        Args:
            plan: adapters of the same sites or of some of them, with any ranks.
            adapter_parameters: their parameters; by default those there are.
        """
        self.adapter_set.plans[self.active_adapter] = plan
        if adapter_parameters is not None and self.active_adapter == FIRST_NAME:
            self._modules["adapters"] = adapter_parameters
        elif adapter_parameters is not None:
            self.adapter_set.added._modules[self.active_adapter] = adapter_parameters
