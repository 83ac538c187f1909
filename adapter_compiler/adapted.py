"""The user's model with adapters: called like it, trained like it, folded back into it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from adapter_compiler.adapter_holder import AdapterHolder
from adapter_compiler.config import AdapterConfig
from adapter_compiler.dispatch.attach import (
    attach_adapters,
    detach_adapters,
    find_exchanged,
    find_holders,
    find_places,
    find_slots,
    share_slots,
)
from adapter_compiler.dispatch.options import AttachOptions
from adapter_compiler.dispatch.scope import Token, calling, is_visible, without_adapters
from adapter_compiler.graphs import capture_adapted
from adapter_compiler.ownership import (
    clone_parameter,
    copy_module,
    detach_computed_attributes,
    replace_parameter,
    share_unpacked,
)
from adapter_compiler.quantisation import QuantisationReport, WeightError, quantise_base
from adapter_compiler.report.adapters import AdapterReport, describe_adapters
from adapter_compiler.store import AdapterStore
from passes.fold_adapters import merge_weight
from passes.packed_weights import find_packed_weights, moved_weights, read_parameter, set_parameter
from passes.plan import AdapterPlan
from passes.sites import AdapterSite, SiteSearch
from passes.weight_uses import find_parameter_aliases

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


#: Attributes that an adapted model has itself, whatever the user's module has.
_OWN = frozenset(
    {
        "adapter_set",
        "fold_report",
        "options",
        "quantisation_report",
        "rejected",
        "training",
        "unadapted_sites",
        "unused",
        "was_called",
    }
)


class AdaptedModel(AdapterHolder):
    """A module whose chosen weights carry adapters. Made by ``compile_with_adapters``.

    A call runs the user's own Python. Whoever reads an adapted weight there, in whatever way, gets W + ΔW
    (:mod:`adapter_compiler.dispatch`): methods, submodules, hooks, changed attributes and threads all see the adapters.
    The weights are the user's own storage and frozen.

    What this class does not define is looked up in the user's module: ``adapted.generate(...)``, ``adapted.config``,
    ``adapted.encoder(x)``. Assigning to an attribute that only the user's module has assigns it there.

    Attributes:
        module: the user's module (a copy that shares the weights' storage, unless ``inplace``). Its methods and
            submodules run with the adapters. Its parameters are the plain weights, under the names they always had;
            the attribute of an adapted weight (``module.head.weight``) reads as W + ΔW.
        adapters: the active adapter's parameters, ``<weight's name>.{P, lam, Q}``.
        plan: which site has which adapter, in the active one.
        options: the options it was compiled with.
        rejected: why each other weight carries no adapter, by name.
        unadapted_sites: those of the other weights that could carry one.
        fold_report: rounding errors of the last :meth:`fold`.
        quantisation_report: what was quantised, with its errors and the memory before and after.
        was_called: whether a call has run.
        unused: the weights with an adapter that the first call did not use.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        plan: AdapterPlan,
        store: AdapterStore,
        options: AdapterConfig,
        search: SiteSearch,
        gradient_flags: Mapping[str, bool],
        attaching: AttachOptions,
    ) -> None:
        super().__init__(module, plan, store)
        self.options = options
        self.rejected = search.rejected
        self.unadapted_sites = search.others
        self.fold_report: FoldReport | None = None
        self.quantisation_report: QuantisationReport | None = None
        self.was_called = False
        self.unused: tuple[str, ...] = ()
        self.training = module.training
        self._gradient_flags = gradient_flags
        self._attaching = attaching
        self._token = Token()
        self._told_of: set[str] = set()
        self._attach()

    @property
    def sites(self) -> tuple[AdapterSite, ...]:
        """The adapted weights in model order; each has a ``name``, the weight's qualified name."""
        return tuple(adapter.site for adapter in self.plan)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for these arguments, with the adapters."""
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        self._warn_of_exchanged()
        with calling(self._token, find_exchanged(self._holders)):
            return self.module(*args, **kwargs) if self.was_called else self._call_first(args, kwargs)

    def _call_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same, and a warning for each weight with an adapter that the call does not use."""
        self.was_called = True
        noted = self._token.noted = set()
        try:
            result = self.module(*args, **kwargs)
        finally:
            self._token.noted = None
        visible = noted or is_visible(self._token)
        self.unused = tuple(name for name in self.plan.live.by_weight if name not in noted) if visible else ()
        if self.unused:
            logger.warning("no adapter trains at %s: the first call does not use the weight", ", ".join(self.unused))
        return result

    def capture(self, *args: Any, **kwargs: Any) -> GraphModule:
        """The fx graph of a call with these arguments, with the adapters in it; see :mod:`adapter_compiler.graphs`.

        Raises:
            CaptureError: the call does not capture as one graph that computes the same.
        """
        options = self._attaching
        return capture_adapted(
            self.module, self.plan, self.adapters, args, kwargs, fused=options.fused, recompute=options.recompute
        )

    def rebuild(self, plan: AdapterPlan, store: AdapterStore | None = None) -> None:
        """Put the adapters of another plan at the weights.

        Args:
            plan: adapters of the same sites or of some of them, with any ranks.
            store: their parameters; by default those there are.
        """
        self._adopt(plan, store)
        self._attach()

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
        """Put packed weights, by first name, in the place of the frozen ones."""
        for name, first in find_parameter_aliases(self.module).items():
            if first in weights:
                set_parameter(self.module, name, weights[first])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The adapters' parameters, then those that ``AdapterConfig(trainable=...)`` names."""
        return [p for p in (*self.adapters.parameters(), *self.module.parameters()) if p.requires_grad]

    def parameter_groups(
        self, lr: float, *, lora_plus_ratio: float = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer with a greater learning rate for B or P, see :mod:`adapter_compiler.lora_plus`."""
        from adapter_compiler.lora_plus import make_parameter_groups

        return make_parameter_groups(self, lr, lora_plus_ratio=lora_plus_ratio, weight_decay=weight_decay)

    def disable_adapters(self) -> contextlib.AbstractContextManager[None]:
        """A context in which this thread runs the user's module without adapters; other threads are not concerned."""
        return without_adapters(self._token)

    def fold(self) -> nn.Module:
        """The user's own model with every ΔW merged into its weight.

        Returns:
            A copy of the user's class with its state-dict keys, buffers, ``requires_grad`` flags and
            present training mode, which shares nothing with this object. Sums are made in float64
            and cast once; :attr:`fold_report` then holds the rounding errors. Quantised weights are unpacked.
        """
        self._warn_of_exchanged()
        slots = find_slots(self.module)
        errors: dict[str, float] = {}

        def merge(name: str, parameter: nn.Parameter) -> nn.Parameter:
            slot = slots.get(name)
            first_name = name if slot is None else slot.weight
            flag = self._gradient_flags.get(first_name, parameter.requires_grad)
            if slot is None:
                return clone_parameter(parameter, requires_grad=flag)
            weight: torch.Tensor = parameter
            for adapter in slot.adapters:
                merged = merge_weight(weight, adapter.planned, adapter.bind().parameters)
                weight, errors[adapter.planned.site.name] = merged.weight, merged.rounding_error
            return replace_parameter(parameter, weight, requires_grad=flag)

        folded = self._copy_without_adapters(merge)
        quantised = {} if self.quantisation_report is None else self.quantisation_report.errors
        self.fold_report = FoldReport(rounding_error=errors, quantisation_error=quantised)
        return folded

    def base_weight(self, name: str) -> nn.Parameter:
        """The frozen weight W with this qualified name, whose attribute reads as W + ΔW."""
        return read_parameter(self.module, name)

    def copy_base(self) -> nn.Module:
        """The user's own model without adapters: a copy over the same weights, frozen (and unpacked)."""
        return self._copy_without_adapters(lambda _, parameter: share_unpacked(parameter))

    def _copy_without_adapters(self, make_parameter: Callable[[str, nn.Parameter], nn.Parameter]) -> nn.Module:
        memo: dict[int, object] = {}
        share_slots(self.module, memo)
        copied = copy_module(self.module, make_parameter, memo)
        detach_adapters(copied)
        return copied

    def report(self) -> AdapterReport:
        """What was adapted and what was not, with reasons; ``print`` it or read its fields."""
        return describe_adapters(self)

    def save(self, directory: str | Path, *, name: str | None = None) -> Path:
        """Write an adapter (the active one, or ``name``); see :func:`adapter_compiler.checkpoint.save_adapters`."""
        from adapter_compiler.checkpoint import save_adapters

        return save_adapters(self, directory, name=name)

    def _attach(self) -> None:
        attach_adapters(self.module, self.plan, self.adapters, self._token, self._attaching)
        self._places, self._holders = find_places(self.module), find_holders(self.module)

    def _warn_of_exchanged(self) -> None:
        """Say once of each weight whose module is gone that what stands there now has no adapter."""
        if all(place.is_unchanged for place in self._places):
            return
        held = {slot.weight for slot in find_slots(self.module).values()}
        lost = [name for name in self.plan.live.by_weight if name not in held and name not in self._told_of]
        self._told_of.update(lost)
        self._places, self._holders = find_places(self.module), find_holders(self.module)
        if lost:
            logger.warning(
                "no adapter stands at %s any more: the module was exchanged for another or taken away; to adapt what "
                "stands there now, compile the changed model again",
                ", ".join(lost),
            )

    def __getattr__(self, name: str) -> Any:
        """What the user's module has and this class does not define."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = self.__dict__.get("_modules", {}).get("module")
            if module is None or (name.startswith("__") and name.endswith("__")):
                raise
        try:
            return getattr(module, name)
        except AttributeError as error:
            kind = type(module).__name__
            raise AttributeError(
                f"neither {type(self).__name__} nor the {kind} in it gives {name!r}: {error}"
            ) from None

    def __setattr__(self, name: str, value: Any) -> None:
        """Assign where the attribute is: what only the user's module has is the module's."""
        module = self.__dict__.get("_modules", {}).get("module")
        if module is None or self._defines(name) or not hasattr(module, name):
            super().__setattr__(name, value)
        else:
            setattr(module, name, value)

    def _defines(self, name: str) -> bool:
        return name.startswith("_") or name in _OWN or name in self._modules or hasattr(type(self), name)

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``.to()``, ``.cuda()``, ``.double()``…: the plans follow the dtypes."""
        with moved_weights(self.module, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        plans = self.adapter_set.plans
        plans.update({name: _follow_dtypes(plan, self.module, self.store_of(name)) for name, plan in plans.items()})
        self._attach()
        return self

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """A model of its own with the same adapters."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        detach_computed_attributes(self.module, memo)
        with torch.no_grad():  # so that what TorchScript copies by itself stays a leaf
            copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        copied._attach()
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what is found again from it."""
        return {key: value for key, value in self.__dict__.items() if key not in ("_places", "_holders")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the adapters at the weights, whatever classes were made of."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()


def _follow_dtypes(plan: AdapterPlan, module: nn.Module, store: AdapterStore) -> AdapterPlan:
    """The plan with the dtypes that the weights and the adapters have now."""
    adapters = []
    for adapter in plan:
        site = dataclasses.replace(adapter.site, dtype=read_parameter(module, adapter.site.weight).dtype)
        dtype = next(iter(store.parameters_of(adapter).values())).dtype
        adapters.append(dataclasses.replace(adapter, site=site, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))
