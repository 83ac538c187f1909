"""The user's model with adapters: called like it, trained like it, folded back into it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from adapter_compiler.adapter_holder import AdapterHolder
from adapter_compiler.config import AdapterConfig
from adapter_compiler.ownership import (
    clone_parameter,
    copy_module,
    detach_computed_attributes,
    replace_parameter,
    share_unpacked,
)
from adapter_compiler.quantisation import QuantisationReport, WeightError, quantise_base
from adapter_compiler.regions import Region, RegionTree
from adapter_compiler.report.adapters import AdapterReport, describe_adapters
from adapter_compiler.store import AdapterStore
from adapter_compiler.variants import Variant
from passes.fold_adapters import merge_weight
from passes.packed_weights import find_packed_weights, moved_weights, read_parameter
from passes.plan import AdapterPlan
from passes.sites import AdapterSite, SiteSearch

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="AdaptedModel")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FoldReport:
    """How exactly each ΔW went into its weight.

    Attributes:
        rounding_error: by site, the largest |W + ΔW as stored - W + ΔW in float64|.
        quantisation_error: by weight that was quantised, how far the W that went into the sum is from the original.
    """

    rounding_error: Mapping[str, float]
    quantisation_error: Mapping[str, WeightError] = dataclasses.field(default_factory=dict)

    @property
    def largest(self) -> float:
        """The largest rounding error over all sites."""
        return max(self.rounding_error.values(), default=0.0)


class AdaptedModel(AdapterHolder):
    """A module whose chosen weights carry adapters. Made by ``compile_with_adapters``.

    Calls run captured graphs: one for each call signature, training mode and set of fixed shapes,
    captured when first needed. What does not capture runs as Python around smaller graphs. The weights
    are the user's own storage and frozen.

    Attributes:
        module: the user's module (a copy that shares the weights' storage, unless ``inplace``).
        adapters: the active adapter's parameters, ``<weight's name>.{P, lam, Q}``.
        plan: which site has which adapter, in the active one.
        config: the options it was compiled with.
        rejected: why each other weight carries no adapter, by name.
        unadapted_sites: those of the other weights that could carry one.
        fold_report: rounding errors of the last :meth:`fold`.
        quantisation_report: what was quantised, with its errors and the memory before and after.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        plan: AdapterPlan,
        store: AdapterStore,
        config: AdapterConfig,
        search: SiteSearch,
        gradient_flags: Mapping[str, bool],
        regions: RegionTree,
    ) -> None:
        super().__init__(module, plan, store)
        self.config = config
        self.rejected = search.rejected
        self.unadapted_sites = search.others
        self.fold_report: FoldReport | None = None
        self.quantisation_report: QuantisationReport | None = None
        self.training = module.training
        self._gradient_flags = gradient_flags
        self._regions = regions
        self._enabled = True

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """The adapted weights in model order; each has a ``name``, the weight's qualified name."""
        return tuple(adapter.site for adapter in self.plan)

    @property
    def regions(self) -> tuple[Region, ...]:
        """The parts of the model that run as graphs, or as Python around smaller parts; the whole model first."""
        return tuple(self._regions.regions.values())

    @property
    def variants(self) -> tuple[Variant, ...]:
        """The captured graphs of all regions."""
        return tuple(variant for region in self.regions for variant in region.variants)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for these arguments, with the adapters."""
        if not self._enabled:
            self._regions.deactivate()
            return self.module(*args, **kwargs)
        is_first = not self._regions.regions
        result = self._regions.call(args, kwargs)
        if is_first and (unused := self.report().unused):
            logger.warning("no adapter trains at %s: the captured call does not use the weight", ", ".join(unused))
        return result

    def rebuild(self, plan: AdapterPlan, store: AdapterStore | None = None) -> None:
        """Give every captured graph the adapters of another plan, without capturing anew.

        Args:
            plan: adapters of the same sites or of some of them, with any ranks.
            store: their parameters; by default those there are.
        """
        self._adopt(plan, store)
        self._regions.adopt(plan, self.adapters)

    def quantise_base(self, kind: str) -> QuantisationReport:
        """Keep the frozen weights under adapters in few bits, as ``AdapterConfig(quantise=kind)`` does from the start.

        Do it after an initialiser that changes frozen weights, and before training: outputs change by what the
        code changes of the weights.

        Args:
            kind: ``"nf4"`` or ``"int8"``.

        Raises:
            ConfigError: the kind is unknown, or there is nothing to quantise (any more).
            MissingDependencyError: bitsandbytes is not installed.
        """
        self.quantisation_report = quantise_base(self, kind)
        return self.quantisation_report

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel must not broadcast: codes are no plain memory, and never change."""
        return [f"module.{name}" for name in find_packed_weights(self.module)]

    def replace_weights(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put packed weights, by name, in the place of the frozen ones; :meth:`rebuild` then makes use of them."""
        self._regions.replace_weights(weights)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, then those that ``AdapterConfig(trainable=...)`` names."""
        return [p for p in (*self.adapters.parameters(), *self.module.parameters()) if p.requires_grad]

    def parameter_groups(
        self, lr: float, *, lora_plus_ratio: float = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer with a greater learning rate for B or P, see :mod:`adapter_compiler.lora_plus`."""
        from adapter_compiler.lora_plus import make_parameter_groups

        return make_parameter_groups(self, lr, lora_plus_ratio=lora_plus_ratio, weight_decay=weight_decay)

    @contextlib.contextmanager
    def disable_adapters(self) -> Iterator[None]:
        """Inside, calls run the user's module itself: no adapter, no captured graph."""
        before, self._enabled = self._enabled, False
        try:
            yield
        finally:
            self._enabled = before

    def fold(self) -> nn.Module:
        """The user's own model with every ΔW merged into its weight.

        Returns:
            A copy of the user's class with its state-dict keys, buffers, ``requires_grad`` flags and
            present training mode, which shares nothing with this object. Sums are made in float64
            and cast once; :attr:`fold_report` then holds the rounding errors. Quantised weights are unpacked.
        """
        adapters = self.plan.live.by_weight
        errors: dict[str, float] = {}

        def merge(name: str, parameter: nn.Parameter) -> nn.Parameter:
            flag = self._gradient_flags[name]
            if name not in adapters:
                return clone_parameter(parameter, requires_grad=flag)
            weight: torch.Tensor = parameter
            for adapter in adapters[name]:
                merged = merge_weight(weight, adapter, self.adapters.parameters_of(adapter))
                weight, errors[adapter.site.name] = merged.weight, merged.rounding_error
            return replace_parameter(parameter, weight, requires_grad=flag)

        folded = self._copy_as_written(merge)
        quantised = {} if self.quantisation_report is None else self.quantisation_report.errors
        self.fold_report = FoldReport(rounding_error=errors, quantisation_error=quantised)
        return folded

    def base_weight(self, name: str) -> nn.Parameter:
        """The frozen weight with this qualified name, while its module may be redirected to W + ΔW."""
        return read_parameter(self.module, name)

    def copy_base(self) -> nn.Module:
        """The user's own model without adapters: a copy over the same weights, frozen (and unpacked)."""
        return self._copy_as_written(lambda _, parameter: share_unpacked(parameter))

    def _copy_as_written(self, make_parameter: Callable[[str, nn.Parameter], nn.Parameter]) -> nn.Module:
        """A copy of the module without what regions put into it while it runs as Python."""
        self._regions.deactivate()
        return copy_module(self.module, make_parameter)

    def report(self) -> AdapterReport:
        """What was adapted and what was not, with reasons; ``print`` it or read its fields."""
        return describe_adapters(self)

    def save(self, directory: str | Path, *, name: str | None = None) -> Path:
        """Write an adapter (the active one, or ``name``); see :func:`adapter_compiler.checkpoint.save_adapters`."""
        from adapter_compiler.checkpoint import save_adapters

        return save_adapters(self, directory, name=name)

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``.to()``, ``.cuda()``, ``.double()``…: graphs hold devices and dtypes, so they are captured anew."""
        with moved_weights(self.module, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._regions.clear()
        plans = self.adapter_set.plans
        plans.update({name: _follow_dtypes(plan, self.module, self.store_of(name)) for name, plan in plans.items()})
        self.rebuild(self.plan)
        return self

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """A model of its own with the same adapters; its graphs are captured when it is called."""
        self._regions.deactivate()
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        detach_computed_attributes(self.module, memo)
        with torch.no_grad():  # so that what TorchScript copies by itself stays a leaf
            copied.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """The model as the user wrote it, the adapters and the options, without graphs."""
        self._regions.deactivate()
        return self.__dict__


def _follow_dtypes(plan: AdapterPlan, module: nn.Module, store: AdapterStore) -> AdapterPlan:
    """The plan with the dtypes that the weights and the adapters have now."""
    adapters = []
    for adapter in plan:
        site = dataclasses.replace(adapter.site, dtype=module.get_parameter(adapter.site.weight).dtype)
        dtype = next(iter(store.parameters_of(adapter).values())).dtype
        adapters.append(dataclasses.replace(adapter, site=site, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))
