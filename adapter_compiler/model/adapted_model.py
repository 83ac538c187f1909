"""The user's model with adapters, which is called and trained like the model itself and can be folded into it."""

from __future__ import annotations

import contextlib
import copy
import copyreg
import dataclasses
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import GraphModule

from adapter_compiler.adapters.combine import Gates, combine_adapters, fix_routing
from adapter_compiler.adapters.copies import detach_computed_attributes, share_unpacked
from adapter_compiler.adapters.named_adapters import add_adapter, remove_adapter, use_adapter
from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.adapters.parameters.sharded import assert_whole
from adapter_compiler.adapters.reports import FoldReport, QuantizationReport, as_html
from adapter_compiler.config.adapter_config import AdapterConfig
from adapter_compiler.config.attach_options import AttachOptions
from adapter_compiler.errors import ConfigError
from adapter_compiler.model.capture.captured_call import capture_adapted
from adapter_compiler.model.dispatch.attach import (
    attach_adapters,
    find_adapted_attributes,
    find_places,
    find_replaced,
    find_slots,
)
from adapter_compiler.model.dispatch.compiled import compile_regions
from adapter_compiler.model.dispatch.scope import Token, calling, is_visible, without_adapters
from adapter_compiler.model.fold import copy_without_adapters, fold_module
from adapter_compiler.model.interface.parameter_groups import make_parameter_groups
from adapter_compiler.model.interface.peft_names import PeftNames
from adapter_compiler.model.interface.show import describe_briefly
from adapter_compiler.model.interface.signed_class import make_signed_class
from adapter_compiler.model.interface.summary import AdapterReport, describe_adapters
from adapter_compiler.model.interface.user_attributes import UserAttributes
from adapter_compiler.model.optimizers.adapter_optimizer import AdapterOptimizer
from adapter_compiler.model.optimizers.make_adapter_optimizer import make_adapter_optimizer
from adapter_compiler.model.parametrized.find import ParametrizedWeight
from adapter_compiler.model.parametrized.replace import assert_known, restore_parametrizations
from adapter_compiler.model.quantized.quantize_base import quantize_base
from adapter_compiler.saving.adapters import save_adapters
from adapter_compiler.saving.load_adapter import load_adapter
from passes.compat import is_compiled
from passes.planning.find_sites import SiteSearch
from passes.planning.plan import AdapterPlan
from passes.quantize.packed_weights import find_packed_weights, moved_weights, read_parameter

logger = logging.getLogger(__name__)

Self = TypeVar("Self", bound="AdaptedModel")


#: What to do where a model cannot be sharded.
_UNSHARDED = "do it before shard(adapted), or with what fold(gather='rank0') of its result gives"


class AdaptedModel(PeftNames, UserAttributes):
    """A module with adapters at some of its weights. Made by ``compile_with_adapters``.

    A call runs the user's own Python, in which every read of an adapted weight gives W + ΔW
    (:mod:`adapter_compiler.model.dispatch`). So methods, submodules, hooks, changed attributes and other threads all
    use the adapters. The weights share the storage of the user's weights and are frozen.

    Attributes that this class does not define are looked up in the user's module: ``adapted.generate(...)``,
    ``adapted.config``, ``adapted.encoder(x)``. An assignment to an attribute that only the user's module has sets it
    there.

    Attributes:
        module: the user's module (a copy that shares the weights' storage, unless ``inplace``). Its methods and
            submodules run with the adapters. Its parameters are the plain weights, under their original names; the
            attribute of an adapted weight (``module.head.weight``) reads as W + ΔW.
        adapters: the active adapter's parameters, ``<weight's name>.{P, lam, Q}``.
        plan: the active adapter's plan: form, rank and scale for each site.
        options: the options that the model was compiled with.
        rejected: why each weight without an adapter has none, by name.
        unadapted_sites: the weights without an adapter that could have one.
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
        parametrized: tuple[ParametrizedWeight, ...] = (),
    ) -> None:
        super().__init__(module, plan=plan, adapter_parameters=adapter_parameters, options=options, search=search)
        self.was_called = False
        self._gradient_flags = gradient_flags
        self._attaching = attaching
        self._parametrized = parametrized
        self._token = Token()
        self._warned_of: set[str] = set()
        self._attach()
        self._sign()

    @property
    def training(self) -> bool:
        """The training mode of the user's module."""
        module = self.__dict__.get("_modules", {}).get("module")
        return module is None or bool(module.training)

    @training.setter
    def training(self, mode: bool) -> None:
        module = self.__dict__.get("_modules", {}).get("module")
        if module is not None:
            module.training = mode

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the user's module returns for these arguments, with the adapters."""
        return self.run_module(args, kwargs)

    def run_module(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the user's module with the adapters; ``forward`` does this under the module's own signature."""
        if torch.compiler.is_compiling():
            return self.module(*args, **kwargs)
        self._warn_of_replaced()
        with calling(self._token, find_replaced(self._adapted_attributes)):
            return self.module(*args, **kwargs) if self.was_called else self._call_first(args, kwargs)

    def _call_first(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the module, and warn if the call does not use a weight with an adapter."""
        self.was_called = True
        if is_compiled(self.module):  # a record of what is used would make the code of the first call another one
            return self.module(*args, **kwargs)
        used = self._token.used = set()
        try:
            result = self.module(*args, **kwargs)
        finally:
            self._token.used = None
        visible = used or is_visible(self._token)
        self.unused = tuple(name for name in self.plan.live.by_weight if name not in used) if visible else ()
        if self.unused:
            logger.warning("no adapter trains at %s: the first call does not use the weight", ", ".join(self.unused))
        return result

    def compile(self, **options: Any) -> None:
        """Compile the blocks that the model repeats with ``torch.compile``, in place.

        Equal blocks are compiled once, at the first call; what is outside of them runs in eager mode. A model without
        repeated blocks is compiled whole, and so is any by ``torch.compile(adapted)``.
        ``AdapterConfig(regions=...)`` names other submodules than the repeated ones. Calls run in eager mode inside
        ``disable_adapters()``, and where torch finds no C++ compiler, of which a warning is logged.

        Args:
            options: of ``torch.compile``, such as ``mode``, ``dynamic`` and ``backend``; ``disable=True`` makes calls
                eager again.
        """
        compile_regions(self.module, self._attaching.regions, self._token, options)

    def capture(self, *args: Any, **kwargs: Any) -> GraphModule:
        """The fx graph of a call with these arguments, with the adapters in it.

        See :mod:`adapter_compiler.model.capture.captured_call`.

        Raises:
            CaptureError: the call cannot be captured as one graph that computes the same.
        """
        assert_whole(self.module, "capture", _UNSHARDED)
        options = self._attaching
        return capture_adapted(
            self.module, self.plan, self.adapters, args, kwargs, fused=options.fused, recompute=options.recompute
        )

    def capture_folded(self, *args: Any, **kwargs: Any) -> GraphModule:
        """The fx graph of a call in which each adapted weight is W + ΔW, as :meth:`fold` gives it, and has no adapter.

        Raises:
            CaptureError: the call cannot be captured as one graph that computes the same.
        """
        assert_whole(self.module, "capture_folded", _UNSHARDED)
        return capture_adapted(
            self.module, self.plan, self.adapters, args, kwargs, fused=False, recompute=False, folded=True
        )

    def rebuild(self, plan: AdapterPlan, adapter_parameters: AdapterParameters | None = None) -> None:
        """Give the active adapter another plan, see :meth:`AdapterState.rebuild`; reads then give the new W + ΔW."""
        super().rebuild(plan, adapter_parameters)
        self._attach()

    def quantize_base(self, kind: str) -> QuantizationReport:
        """Quantize the frozen weights under adapters, as ``AdapterConfig(quantize=kind)`` does when compiling.

        Call it before training, because outputs change by the quantization error.

        Args:
            kind: ``"nf4"`` or ``"int8"``.

        Raises:
            ConfigError: the kind is unknown, the weights are quantized already, or no weight can be quantized.
            MissingDependencyError: bitsandbytes is not installed.
        """
        assert_whole(self.module, "quantize_base", "quantize before the weights are sharded")
        self.quantization_report = quantize_base(self, kind)
        return self.quantization_report

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """The parameters that DistributedDataParallel must not broadcast: quantized ones, which never change."""
        return [f"module.{name}" for name in find_packed_weights(self.module)]

    def parameter_groups(
        self, lr: float, *, lora_plus_ratio: float = 1.0, lam_ratio: float | str = 1.0, weight_decay: float = 0.0
    ) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, with other learning rates for B or P (LoRA+) and for λ.

        See :mod:`adapter_compiler.model.interface.parameter_groups`.
        """
        return make_parameter_groups(
            self, lr, lora_plus_ratio=lora_plus_ratio, lam_ratio=lam_ratio, weight_decay=weight_decay
        )

    def make_optimizer(self, lr: float, **options: Any) -> AdapterOptimizer:
        """An optimizer over all trainable parameters, made for adapters.

        Args:
            lr: learning rate of P and Q (B and A); an element moves by about this much in a step.
            options: ``rule``, ``other_lr``, ``momentum``, ``betas``, ``eps``, ``weight_decay``, see
                :func:`adapter_compiler.make_optimizer`.

        Raises:
            ConfigError: an option cannot work, or the model has nothing to train.
        """
        return make_adapter_optimizer(self, lr, **options)

    def add_adapter(self, name: str, *, config: AdapterConfig | None = None, plan: AdapterPlan | None = None) -> None:
        """Add a new adapter over the same frozen weights; it is inactive until :meth:`use` activates it.

        Args:
            name: its name, without ``.`` and ``/``.
            config: its sites, kind, rank, scale and start; by default those that the model was compiled with. Options
                of the whole model (``trainable``, ``fused``, …) have no effect.
            plan: an existing plan, in place of ``config``.

        Raises:
            ConfigError: the name is not valid or taken, or the weights are sharded.
            SiteError: no weight would get an adapter, or the plan does not fit the model.
        """
        assert_whole(self.module, "add_adapter", "add adapters before shard(adapted), which gives all ranks the same")
        add_adapter(self, name, config=config, plan=plan)

    def load_adapter(self, name: str, directory: str | Path) -> None:
        """Add an inactive adapter from a folder that :meth:`save` or PEFT's ``save_pretrained`` wrote.

        Its ranks, scales and sites may differ from those of the other adapters.

        Raises:
            ConfigError: the name is not valid or taken.
            CheckpointError: the folder cannot be read or belongs to another model.
        """
        load_adapter(self, name, directory)

    def use(self, name: str) -> None:
        """Make an adapter the active one, which calls, training, ``fold`` and ``save`` use.

        Only the active adapter requires grad. Fully trained parameters and persistent buffers get the values that
        they had when this adapter was last active, and their gradients become ``None``. An optimizer keeps the
        parameters that it was made with, so make one for each adapter, from ``trainable_parameters()`` while the
        adapter is active.

        Raises:
            ConfigError: there is no such adapter.
        """
        use_adapter(self, name)

    def remove_adapter(self, name: str) -> None:
        """Remove an inactive adapter.

        Raises:
            ConfigError: there is no such adapter, or it is the active one.
        """
        remove_adapter(self, name)

    def combine(
        self, weights: Mapping[str, float], *, name: str, rank: int | None = None, tensors_from: str | None = None
    ) -> None:
        """Add an inactive adapter that is a weighted sum Σ w_i ΔW_i of existing ones.

        Args:
            weights: w_i by adapter name; they need not sum to 1.
            name: the name of the sum.
            rank: by default the sum is exact, with the triplets of all summands; otherwise each weight gets the best
                approximation of at most this rank (Eckart-Young).
            tensors_from: the adapter from which the sum takes fully trained parameters and buffers; needed only if
                they differ between the adapters.

        Raises:
            ConfigError: a name or weight cannot be used, or an update depends on the frozen weight (DoRA).
        """
        combine_adapters(self, weights, name=name, rank=rank, tensors_from=tensors_from)

    def fix_routing(self, gates: Gates, *, name: str) -> None:
        """Add an inactive adapter that is the active mixture of experts with fixed gates, Σ g_i ΔW_i, exactly.

        It is an ordinary adapter of the same rank, which can be folded, exported at run time and combined. It keeps the
        model's present values of fully trained parameters and buffers.

        Args:
            gates: g_i of every expert, for all routers; or by the name of the site that has the router (the first
                adapted weight of a block with ``Mixture(router="block")``). One expert of four is ``[0, 1, 0, 0]``.
                For adapters with a mask ``[1.0]``, as if it had chosen every token.
            name: the name of the new adapter.

        Raises:
            ConfigError: the active adapter is no mixture, the name is not valid or taken, or gates are missing.
        """
        fix_routing(self, gates, name=name)

    def record_routing(self, recorder: Callable[..., None] | None) -> Callable[..., None] | None:
        """Let routers tell what they choose; for :class:`~adapter_compiler.RouterBalance` and the like.

        Args:
            recorder: called at each run of a router with the name of its site, its inputs, its weights, its
                probabilities and the chosen experts; ``None`` for nobody.

        Returns:
            The recorder that was called until now.
        """
        before, self._token.recorder = self._token.recorder, recorder
        return before

    def disable_adapters(self) -> contextlib.AbstractContextManager[None]:
        """A context in which this thread runs the user's module without adapters; other threads are not affected."""
        return without_adapters(self._token)

    def fold(self, *, parametrized: str = "right_inverse") -> nn.Module:
        """The user's own model with every ΔW merged into its weight.

        Sums are computed in float64 and cast once to the weight's dtype; :attr:`fold_report` then has the rounding
        errors. Quantized weights are unpacked.

        Args:
            parametrized: what becomes of adapted weights that a parametrization computes (weight_norm, spectral_norm,
                orthogonal): ``"right_inverse"`` finds the parameters from which it computes the merged weight, so that
                the model keeps its state-dict keys; ``"remove"`` puts the merged weight in its place.

        Returns:
            A copy of the user's module with its class, state-dict keys, buffers, ``requires_grad`` flags and present
            training mode, which shares no memory with this object.

        Raises:
            ConfigError: ``parametrized`` is neither, a parametrization does not give a merged weight, or the weights
                are sharded.
        """
        assert_whole(self.module, "fold", "call fold(gather='rank0') of what shard(adapted) returned")
        assert_known(parametrized)
        self._warn_of_replaced()
        folded, errors = fold_module(self.module, self._gradient_flags)
        if parametrized == "right_inverse":
            found = restore_parametrizations(folded, self._parametrized, self._gradient_flags)
            errors.update({name: max(error, errors[name]) for name, error in found.items() if name in errors})
        quantized = {} if self.quantization_report is None else self.quantization_report.errors
        self.fold_report = FoldReport(rounding_error=errors, quantization_error=quantized)
        return folded

    def find_gradient_flags(self) -> dict[str, bool]:
        """Which parameters required grad in the model that was compiled, by name."""
        return dict(self._gradient_flags)

    def find_computed_weights(self) -> tuple[str, ...]:
        """The names of the weights that a parametrization computed in the model that was compiled."""
        return tuple(weight.name for weight in self._parametrized)

    def copy_base(self) -> nn.Module:
        """The user's own model without adapters: a frozen copy that shares the weights; quantized ones are unpacked."""
        assert_whole(self.module, "copy_base", _UNSHARDED)
        return copy_without_adapters(self.module, lambda _, parameter: share_unpacked(parameter))

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

    def _warn_of_replaced(self) -> None:
        """Warn once about each weight that lost its adapter because its module was replaced or removed."""
        if all(place.is_unchanged for place in self._places):
            return
        attached = {slot.weight for slot in find_slots(self.module).values()}
        lost = [name for name in self.plan.live.by_weight if name not in attached and name not in self._warned_of]
        self._warned_of.update(lost)
        self._places, self._adapted_attributes = find_places(self.module), find_adapted_attributes(self.module)
        if lost:
            logger.warning(
                "%s has no adapter any more, because the module was replaced or removed; to adapt the new module, "
                "compile the changed model again",
                ", ".join(lost),
            )

    def _apply(self: Self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """``.to()``, ``.cuda()``, ``.double()``…: move the module and the adapters, and update dtypes in the plans."""
        with moved_weights(self.module, fn):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        plans = self.adapter_set.plans
        plans.update(
            {name: _follow_dtypes(plan, self.module, self.parameters_of_adapter(name)) for name, plan in plans.items()}
        )
        self._attach()
        return self

    def _replicate_for_data_parallel(self) -> Any:
        """Refuse ``nn.DataParallel``, whose replicas would run without the adapters' gradients.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "nn.DataParallel copies a model without its adapters, expected one process for each device; use "
            "DistributedDataParallel, or shard(adapted)"
        )

    def __repr__(self) -> str:
        return describe_briefly(self)

    def _repr_html_(self) -> str:
        return as_html(str(self.report()))

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        """An independent model with copies of the adapters.

        Raises:
            ConfigError: the weights are sharded.
        """
        assert_whole(self.module, "a copy of the model", "copy the adapters, as in AveragedModel(adapted.adapters)")
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        detach_computed_attributes(self.module, memo)
        with torch.no_grad():  # so that a tensor that TorchScript copies itself stays a leaf
            copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what :meth:`_attach` computes again."""
        found = super().__getstate__()
        return {key: value for key, value in found.items() if key not in ("_places", "_adapted_attributes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Attach the adapters again."""
        super().__setstate__(state)
        self._attach()
        self._sign()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as an instance of this class, because subclasses of ``make_signed_class`` cannot be imported."""
        reduced = super().__reduce_ex__(protocol)
        if isinstance(reduced, tuple) and reduced[0] is copyreg.__newobj__:  # type: ignore[attr-defined]
            return (_make_empty, (), *reduced[2:])
        return reduced

    def _sign(self) -> None:
        object.__setattr__(self, "__class__", make_signed_class(AdaptedModel, self.module))


def _make_empty() -> AdaptedModel:
    """A model that pickle fills."""
    return AdaptedModel.__new__(AdaptedModel)


def _follow_dtypes(plan: AdapterPlan, module: nn.Module, adapter_parameters: AdapterParameters) -> AdapterPlan:
    """The plan with the dtypes that the weights and the adapters have now."""
    adapters = []
    for adapter in plan:
        site = dataclasses.replace(adapter.site, dtype=read_parameter(module, adapter.site.weight).dtype)
        dtype = next(iter(adapter_parameters.parameters_of(adapter).values())).dtype
        adapters.append(dataclasses.replace(adapter, site=site, dtype=dtype))
    return AdapterPlan(adapters=tuple(adapters))
