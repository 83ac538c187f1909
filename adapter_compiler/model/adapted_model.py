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

from adapter_compiler.adapters.adapter_state import AdapterState
from adapter_compiler.adapters.combine import combine_adapters
from adapter_compiler.adapters.copies import (
    clone_parameter,
    copy_module,
    detach_computed_attributes,
    replace_parameter,
    share_unpacked,
)
from adapter_compiler.adapters.named_adapters import add_adapter, remove_adapter, use_adapter
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.reports import FoldReport, QuantizationReport
from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.config.attach_options import AttachOptions
from adapter_compiler.model.captured_call import capture_adapted
from adapter_compiler.model.dispatch.attach import (
    attach_adapters,
    detach_adapters,
    find_adapted_attributes,
    find_exchanged,
    find_places,
    find_slots,
    share_slots,
)
from adapter_compiler.model.dispatch.scope import Token, calling, is_visible, without_adapters
from adapter_compiler.model.parameter_groups import make_parameter_groups
from adapter_compiler.model.quantized.quantize_base import quantize_base
from adapter_compiler.model.summary import AdapterReport, describe_adapters
from adapter_compiler.saving.adapters import save_adapters
from adapter_compiler.saving.load_adapter import load_adapter
from passes.adapt.fold_adapters import merge_weight
from passes.planning.find_sites import SiteSearch
from passes.planning.plan import AdapterPlan
from passes.quantize.packed_weights import find_packed_weights, moved_weights, read_parameter

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="AdaptedModel")


#: Attributes that an adapted model has itself, whatever the user's module has.
_OWN = frozenset(
    {
        "adapter_set",
        "fold_report",
        "options",
        "quantization_report",
        "rejected",
        "training",
        "unadapted_sites",
        "unused",
        "was_called",
    }
)


class AdaptedModel(AdapterState):
    """A module whose chosen weights carry adapters. Made by ``compile_with_adapters``.

    A call runs the user's own Python. Whoever reads an adapted weight there, in whatever way, gets W + ΔW
    (:mod:`adapter_compiler.model.dispatch`): methods, submodules, hooks, changed attributes and threads all see the
    adapters.
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
        quantization_report: what was quantized, with its errors and the memory before and after.
        was_called: whether a call has run.
        unused: the weights with an adapter that the first call did not use.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        plan: AdapterPlan,
        adapter_parameters: AdapterParameters,
        options: AdapterConfig,
        search: SiteSearch,
        gradient_flags: Mapping[str, bool],
        attaching: AttachOptions,
    ) -> None:
        super().__init__(module, plan=plan, adapter_parameters=adapter_parameters, options=options, search=search)
        self.was_called = False
        self.training = module.training
        self._gradient_flags = gradient_flags
        self._attaching = attaching
        self._token = Token()
        self._told_of: set[str] = set()
        self._attach()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for these arguments, with the adapters."""
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        self._warn_of_exchanged()
        with calling(self._token, find_exchanged(self._adapted_attributes)):
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
        """The fx graph of a call with these arguments, with the adapters in it.

        See :mod:`adapter_compiler.model.captured_call`.

        Raises:
            CaptureError: the call does not capture as one graph that computes the same.
        """
        options = self._attaching
        return capture_adapted(
            self.module, self.plan, self.adapters, args, kwargs, fused=options.fused, recompute=options.recompute
        )

    def rebuild(self, plan: AdapterPlan, adapter_parameters: AdapterParameters | None = None) -> None:
        """As :meth:`AdapterState.rebuild`, and reads of the weights give the new W + ΔW from now on."""
        super().rebuild(plan, adapter_parameters)
        self._attach()

    def quantize_base(self, kind: str) -> QuantizationReport:
        """Keep the frozen weights under adapters in few bits, as ``AdapterConfig(quantize=kind)`` does from the start.

        Do it after an initializer that changes frozen weights, and before training: outputs change by what the
        code changes of the weights.

        Args:
            kind: ``"nf4"`` or ``"int8"``.

        Raises:
            ConfigError: the kind is unknown, or there is nothing to quantize (any more).
            MissingDependencyError: bitsandbytes is not installed.
        """
        self.quantization_report = quantize_base(self, kind)
        return self.quantization_report

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What DistributedDataParallel must not broadcast: codes are no plain memory, and never change."""
        return [f"module.{name}" for name in find_packed_weights(self.module)]

    def parameter_groups(
        self, lr: float, *, lora_plus_ratio: float = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Groups for an optimizer with a greater learning rate for B or P.

        See :mod:`adapter_compiler.model.parameter_groups`.
        """
        return make_parameter_groups(self, lr, lora_plus_ratio=lora_plus_ratio, weight_decay=weight_decay)

    def add_adapter(self, name: str, *, config: AdapterConfig | None = None, plan: AdapterPlan | None = None) -> None:
        """Add a fresh adapter over the same frozen weights; it rests until :meth:`use` names it.

        Args:
            name: what to call it, without ``.`` and ``/``.
            config: sites, rank and the like; by default those the model was compiled with. What concerns graphs
                and ``trainable`` stays as compiled.
            plan: the adapters themselves, in place of ``config``.

        Raises:
            ConfigError: the name is taken or cannot be one.
            SiteError: nothing is adapted, or the plan does not fit the model.
        """
        add_adapter(self, name, config=config, plan=plan)

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Add an adapter, which rests, from a folder that :meth:`save` or PEFT's ``save_pretrained`` wrote.

        Its ranks, scales and sites may be other than those of the adapters there are.

        Raises:
            ConfigError: the name is taken or cannot be one.
            CheckpointError: the folder cannot be read or belongs to another model.
        """
        load_adapter(self, name, directory)

    def use(self, name: str) -> None:
        """Let calls, training, ``fold`` and ``save`` work with the adapter of this name from now on.

        Only the active adapter requires grad. Fully trained parameters and persistent buffers get the values that
        they had when this adapter was last active; their gradients go. Optimizers hold the adapters that they were
        made with: make one for each, from ``trainable_parameters()`` while its adapter is active.

        Raises:
            ConfigError: there is no such adapter.
        """
        use_adapter(self, name)

    def remove_adapter(self, name: str) -> None:
        """Forget a inactive adapter.

        Raises:
            ConfigError: there is no such adapter, or it is the active one.
        """
        remove_adapter(self, name)

    def combine(
        self, weights: Mapping[str, float], *, name: str, rank: int | None = None, tensors_from: str | None = None
    ) -> None:
        """Add the adapter Σ w_i ΔW_i, which rests, from adapters there are.

        Args:
            weights: w_i by adapter; they need not sum to 1.
            name: what to call the sum.
            rank: by default the sum is exact, with the triplets of all summands; otherwise each weight gets the best
                approximation of at most this rank.
            tensors_from: the adapter whose fully trained parameters and buffers the sum has; needed only if they
                differ.

        Raises:
            ConfigError: a name or weight cannot be used, or an update depends on the frozen weight (DoRA).
        """
        combine_adapters(self, weights, name=name, rank=rank, tensors_from=tensors_from)

    def disable_adapters(self) -> contextlib.AbstractContextManager[None]:
        """A context in which this thread runs the user's module without adapters; other threads are not concerned."""
        return without_adapters(self._token)

    def fold(self) -> nn.Module:
        """The user's own model with every ΔW merged into its weight.

        Returns:
            A copy of the user's class with its state-dict keys, buffers, ``requires_grad`` flags and
            present training mode, which shares nothing with this object. Sums are made in float64
            and cast once; :attr:`fold_report` then holds the rounding errors. Quantized weights are unpacked.
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
        quantized = {} if self.quantization_report is None else self.quantization_report.errors
        self.fold_report = FoldReport(rounding_error=errors, quantization_error=quantized)
        return folded

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
        """Write an adapter (the active one, or ``name``).

        See :func:`adapter_compiler.saving.adapters.save_adapters`.
        """
        return save_adapters(self, directory, name=name)

    def _attach(self) -> None:
        attach_adapters(self.module, self.plan, self.adapters, self._token, self._attaching)
        self._places, self._adapted_attributes = find_places(self.module), find_adapted_attributes(self.module)

    def _warn_of_exchanged(self) -> None:
        """Say once of each weight whose module is gone that what stands there now has no adapter."""
        if all(place.is_unchanged for place in self._places):
            return
        held = {slot.weight for slot in find_slots(self.module).values()}
        lost = [name for name in self.plan.live.by_weight if name not in held and name not in self._told_of]
        self._told_of.update(lost)
        self._places, self._adapted_attributes = find_places(self.module), find_adapted_attributes(self.module)
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
        plans.update(
            {name: _follow_dtypes(plan, self.module, self.parameters_of_adapter(name)) for name, plan in plans.items()}
        )
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
        return {key: value for key, value in self.__dict__.items() if key not in ("_places", "_adapted_attributes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Put the adapters at the weights, whatever classes were made of."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._attach()


def _follow_dtypes(plan: AdapterPlan, module: nn.Module, adapter_parameters: AdapterParameters) -> AdapterPlan:
    """The plan with the dtypes that the weights and the adapters have now."""
    adapters = []
    for adapter in plan:
        site = dataclasses.replace(adapter.site, dtype=read_parameter(module, adapter.site.weight).dtype)
        dtype = next(iter(adapter_parameters.parameters_of(adapter).values())).dtype
        adapters.append(dataclasses.replace(adapter, site=site, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))
