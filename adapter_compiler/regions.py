"""The regions of a model at run time: graphs where it captures, Python where it does not.

The root is the whole model. A call that a region cannot capture runs the region's own Python, in which
every submodule that it calls is a region of its own and every adapted weight that it looks up is W + ΔW.
So no call ever runs without the adapters, whatever the Python does.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Collection, Generator, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from adapter_compiler.adapted_graphs import AdapterContext, GraphAdapter
from adapter_compiler.store import AdapterStore
from adapter_compiler.variants import Variant, VariantCache
from passes.assumptions import AssumptionError, undone_on_departure
from passes.base import CaptureError
from passes.calls import ModuleCall, sort_keywords, split_call
from passes.capture import CapturedGraph, capture_call
from passes.module_state import (
    is_collecting,
    runs_more_than_forward,
    without_fast_path,
)
from passes.packed_weights import read_parameter, set_parameter
from passes.plan import AdapterPlan, PlannedAdapter
from passes.python_uses import WatchWeights
from passes.quantise_weights import QuantiseWeightsPass
from passes.regions import Rewiring
from passes.twins import find_twin_graph
from passes.weight_uses import WeightUse, find_foreign_weight, find_parameter_aliases

logger = logging.getLogger(__name__)

#: Captures a region may make, in multiples of the graphs that it keeps, before it stays with Python.
_CAPTURES_PER_KEPT_GRAPH = 4


class Region:
    """A module that runs as graphs, one a call signature, or as Python around smaller regions.

    Attributes:
        path: the module's qualified name in the model; empty for the model itself.
        module: the module.
        aliases: its parameters' names → their first names in the model.
        variants: its graphs.
        refused: why a call does not capture, by the call's key.
    """

    def __init__(self, path: str, module: nn.Module, aliases: Mapping[str, str], tree: RegionTree) -> None:
        """A region without graphs."""
        self.path = path
        self.module = module
        self.aliases = aliases
        self.variants = VariantCache(module, aliases, tree.context, tree.adapter)
        self.refused: dict[Hashable, str] = {}
        self._tree = tree
        self._captures = 0

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the module's ``forward`` returns for these arguments, with the adapters."""
        if torch.compiler.is_compiling():
            return self._run_compiled(args, kwargs)
        with self._tree.watching(paused=True):
            found = self.find_graph(args, kwargs)
            if found is not None:
                try:
                    return self._run_graph(*found)
                except AssumptionError as error:
                    self._note_departure(found[0], str(error))
        return self._tree.run_python(self.module, args, kwargs)

    def _run_graph(self, variant: Variant, call: ModuleCall) -> Any:
        checkpointed = self._tree.context.checkpointed
        if not variant.captured.assumptions:
            return variant.run(call, checkpointed=checkpointed)
        variant.record.calls += 1
        with undone_on_departure(self.module):
            return variant.run(call, checkpointed=checkpointed)

    def _note_departure(self, variant: Variant, reason: str) -> None:
        variant.record.departures += 1
        logger.debug("%s runs as Python this time: %s", self.path or "the model", reason)
        if variant.record.is_poor:
            record = variant.record
            self._refuse(
                self.variants.drop(variant),
                f"values departed from the example's in {record.departures} of {record.calls} calls: {reason}",
            )

    def _run_compiled(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Under torch.compile the choice of the graph is left to Python, and the graph is compiled."""
        found = torch.compiler.disable(self.find_graph)(args, kwargs)
        if found is None or found[0].captured.assumptions:  # a compiled graph has no way out
            return self._tree.run_python(self.module, args, kwargs)
        variant, call = found
        return variant.run(call, checkpointed=self._tree.context.checkpointed)

    def find_graph(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Variant, ModuleCall] | None:
        """The graph for a call, captured if there is none yet; ``None`` if the call does not capture."""
        if inner := self._tree.find_boundary_inside(self):
            self._refuse("boundary", f"it holds the region {inner}, which the configuration names")
            return None
        if is_collecting(self.module):
            self._refuse("collecting", "its caller collects outputs of its submodules through hooks")
            return None
        try:
            call = split_call(args, sort_keywords(kwargs))
            key = self.variants.key_of(call)
            variant = self.variants.find(call, key)
        except (CaptureError, TypeError) as error:  # TypeError: a constant that cannot be hashed
            self._refuse("arguments", str(error))
            return None
        if variant is None and not self._is_refused(key):
            try:
                variant = self.variants.add(call, key, self._capture(call.detached(), key))
            except CaptureError as error:
                self._refuse(key, str(error))
        return None if variant is None else (variant, call)

    def _capture(self, call: ModuleCall, key: Hashable) -> CapturedGraph:
        self._captures += 1
        # Without hooks of its own, a capture inside an activation checkpoint would count as part of it.
        with self._tree.capturing(self.module), torch.autograd.graph.saved_tensors_hooks(_keep, _keep):
            with contextlib.closing(self._find_candidates(call, key)) as candidates:
                twin = find_twin_graph(self.module, call, candidates)
            if twin is not None:
                return twin
            captured = capture_call(self.module, call)
        if name := find_foreign_weight(captured.graph_module, self.module, self._tree.module):
            raise CaptureError(f"it uses {name}, which is a weight of another part of the model")
        return captured

    def _find_candidates(
        self, call: ModuleCall, key: Hashable
    ) -> Generator[tuple[nn.Module, CapturedGraph], None, None]:
        """Modules of the same class, each as written while it is looked at, and their graphs for the same call."""
        for other, variant in self._tree.find_variants_like(self, key, call):
            with self._tree.as_written(other.module):
                yield other.module, variant.captured

    def _is_refused(self, key: Hashable) -> bool:
        limit = self._tree.context.limit
        if self._captures >= limit * _CAPTURES_PER_KEPT_GRAPH:
            self._refuse("count", f"more than {limit * _CAPTURES_PER_KEPT_GRAPH} call signatures; {limit} are kept")
            return True
        return key in self.refused or len(self.refused) >= limit * _CAPTURES_PER_KEPT_GRAPH

    def _refuse(self, key: Hashable, reason: str) -> None:
        if key not in self.refused:
            self.refused[key] = reason
            logger.info("%s runs as Python around smaller regions: %s", self.path or "the model", reason)


class RegionTree:
    """All regions of one model.

    Attributes:
        module: the model.
        context: the adapters and options that the regions share.
        adapter: inserts the adapters into graphs.
        regions: by module, in the order in which they were first called.
        aliases: every parameter name → the first name of the same Parameter.
        boundaries: names of the submodules that are to be regions by themselves.
    """

    def __init__(self, module: nn.Module, context: AdapterContext, boundaries: Collection[str] = ()) -> None:
        """A tree without graphs; ``boundaries`` are names of submodules that are to be regions."""
        self.module = module
        self.context = context
        self.adapter = GraphAdapter(context)
        self.regions: dict[nn.Module, Region] = {}
        self.boundaries = tuple(boundaries)
        self.aliases = find_parameter_aliases(module)
        self._paths: dict[nn.Module, str] = {}
        self._rewiring = Rewiring(module, self._dispatch)
        self._watch: WatchWeights | None = None
        self._effective: dict[Hashable, torch.Tensor] | None = None
        self._is_capturing = False
        self._adapters: dict[str, tuple[PlannedAdapter, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionTree:
        """Graphs are not copied: those of the copy are captured when it is called."""
        self.deactivate()
        context = dataclasses.replace(self.context, store=copy.deepcopy(self.context.store, memo))
        return RegionTree(copy.deepcopy(self.module, memo), context, self.boundaries)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not pickled either."""
        self.deactivate()
        return {"module": self.module, "context": self.context, "boundaries": self.boundaries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As if made anew."""
        self.__init__(state["module"], state["context"], state["boundaries"])  # type: ignore[misc]

    @property
    def root(self) -> Region:
        """The region of the whole model."""
        return self.region_of(self.module)

    def call(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """What the model returns, with the adapters; the hooks of the model itself run as ever."""
        before, self._effective = self._effective, {}
        try:
            if not runs_more_than_forward(self.module):
                return self.root.run(args, kwargs)
            with self._answered_by_root():
                return self.module(*args, **kwargs)
        finally:
            self._effective = before

    def adopt(self, plan: AdapterPlan, store: AdapterStore) -> None:
        """Insert other adapters into every graph there is; nothing is captured anew."""
        self.deactivate()
        is_like_present = plan == self.context.plan and store is not self.context.store
        self.adapter.use(plan, store)
        for region in self.regions.values():
            if is_like_present:
                region.variants.exchange_store()
            else:
                region.variants.rebuild()

    def replace_weights(self, weights: Mapping[str, nn.Parameter]) -> None:
        """Put packed weights, by first name, into the module and every graph; :meth:`adopt` then makes use of them."""
        self.deactivate()
        for name, first in self.aliases.items():
            if first in weights:
                set_parameter(self.module, name, weights[first])
        for region in self.regions.values():
            for variant in region.variants:
                for graph_module in (variant.captured.graph_module, variant.adapted.graph_module):
                    QuantiseWeightsPass(weights=weights, aliases=region.aliases)(graph_module)

    def clear(self) -> None:
        """Forget graphs and refusals, because weights moved to another device or dtype."""
        self.deactivate()
        self.regions.clear()

    def deactivate(self) -> None:
        """Leave the model as the user wrote it, until the next call runs Python."""
        self._rewiring.deactivate()

    @contextlib.contextmanager
    def capturing(self, module: nn.Module) -> Iterator[None]:
        """Inside, a region's module is as written, and refuses whatever adapted weights it has from elsewhere.

        Calls and look-ups inside the module are not redirected, so those that are lead out of it.
        """
        before, self._is_capturing = self._is_capturing, True
        try:
            with self.as_written(module):
                yield
        finally:
            self._is_capturing = before

    def as_written(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Inside, ``module``, which is the model or a part of it, is as the user wrote it, without adapters."""
        return self._rewiring.undone_within(module)

    def region_of(self, module: nn.Module) -> Region:
        """The region of a module; one also where the module stands at several places."""
        if module not in self.regions:
            path = self._find_path(module)
            prefix = f"{path}." if path else ""
            names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
            aliases = {name: self.aliases[prefix + name] for name in names}
            self.regions[module] = Region(path, module, aliases, self)
        return self.regions[module]

    def _find_path(self, module: nn.Module) -> str:
        if module not in self._paths:
            self._paths = {child: name for name, child in self.module.named_modules()}
        return self._paths[module]

    def find_boundary_inside(self, region: Region) -> str | None:
        """The first submodule that is to be a region by itself, so that ``region`` cannot be one graph."""
        prefix = f"{region.path}." if region.path else ""
        return next((name for name in self.boundaries if name.startswith(prefix) and name != region.path), None)

    def find_variants_like(self, region: Region, key: Hashable, call: ModuleCall) -> Iterator[tuple[Region, Variant]]:
        """Graphs of other modules of the same class that answer the same call."""
        for other in list(self.regions.values()):
            if other is not region and type(other.module) is type(region.module):
                variant = other.variants.find(call, key)
                if variant is not None:
                    yield other, variant

    def watching(self, *, paused: bool) -> contextlib.AbstractContextManager[None]:
        """Notes what Python does with weights, while :meth:`watch_python` wants to know."""
        return contextlib.nullcontext() if self._watch is None else self._watch.watching(paused=paused)

    def run_python(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a module's own code with its submodules as regions and its weights adapted."""
        self._activate()
        with without_fast_path(), self.watching(paused=False):
            return self._rewiring.original_forward(module)(*args, **kwargs)

    def _dispatch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(parameter.dim() >= 2 for parameter in module.parameters()):
            return self._rewiring.original_forward(module)(*args, **kwargs)
        if self._is_capturing:
            raise CaptureError(f"it uses {self._find_path(module)}, which is another part of the model")
        return self.region_of(module).run(args, kwargs)

    def _activate(self) -> None:
        if not self._rewiring.is_active:
            self._adapters = self.context.plan.live.by_weight
            weights = {name: first for name, first in self.aliases.items() if first in self._adapters}
            self._rewiring.activate(weights, self._look_up)

    def _look_up(self, name: str) -> torch.Tensor:
        """W + ΔW, made once a call of the model; in backward, where checkpoints compute again, each time."""
        if self._is_capturing:
            raise CaptureError(f"it uses {name}, which is a weight of another part of the model")
        key = (name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if self._effective is None or torch._C._current_graph_task_id() != -1:
            return self._make_effective(name)
        if key not in self._effective:
            self._effective[key] = self._make_effective(name)
        return self._effective[key]

    def _make_effective(self, name: str) -> torch.Tensor:
        weight = read_parameter(self.module, name)
        assert self.context.store is not None
        with self.watching(paused=True), torch.autocast(weight.device.type, enabled=False):
            total: torch.Tensor = weight
            for adapter in self._adapters[name]:
                parameters = self.context.store.parameters_of(adapter)
                total = adapter.rescale(total + adapter.delta(parameters).to(weight.dtype), parameters)
            return total

    def watch_python(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[WeightUse]]:
        """What the Python between the graphs does with weights in one call, by the weights' first names."""
        self._watch = WatchWeights({name: p for name, p in self.module.named_parameters() if p.dim() >= 2})
        try:
            with self._watch:
                self.call(args, kwargs)
            return self._watch.uses
        finally:
            self._watch = None

    @contextlib.contextmanager
    def _answered_by_root(self) -> Iterator[None]:
        """Let the model's own ``__call__``, which runs its hooks, end in the root region."""
        before = self.module.__dict__.get("forward")
        self.module.__dict__["forward"] = lambda *args, **kwargs: self._as_root(before, args, kwargs)
        try:
            yield
        finally:
            self._restore_root(before)

    def _as_root(self, before: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._restore_root(before)
        return self.root.run(args, kwargs)

    def _restore_root(self, before: Any) -> None:
        self.module.__dict__.pop("forward", None)
        if before is not None:
            self.module.__dict__["forward"] = before


def _keep(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
