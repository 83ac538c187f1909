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
import warnings
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
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
    is_without_memory,
    restored_state,
    runs_more_than_forward,
    without_fast_path,
)
from passes.packed_weights import set_parameter
from passes.plan import AdapterPlan, PlannedAdapter
from passes.python_uses import WatchWeights
from passes.quantise_weights import QuantiseWeightsPass
from passes.recording import record_call
from passes.regions import Rewiring
from passes.twins import find_twin_graph
from passes.weight_uses import WeightUse, find_parameter_aliases, find_weight_uses

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
        with self._tree.as_written(), torch.autograd.graph.saved_tensors_hooks(_keep, _keep):
            twins = ((other.module, v.captured) for other, v in self._tree.find_variants_like(self, key, call))
            return find_twin_graph(self.module, call, twins) or capture_call(self.module, call)

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
    """

    def __init__(self, module: nn.Module, context: AdapterContext, boundaries: Collection[str] = ()) -> None:
        """A tree without graphs; ``boundaries`` are names of submodules that are to be regions."""
        self.module = module
        self.context = context
        self.adapter = GraphAdapter(context)
        self.regions: dict[nn.Module, Region] = {}
        self._boundaries = tuple(boundaries)
        self._aliases = find_parameter_aliases(module)
        self._rewiring = Rewiring(module, self._dispatch)
        self._watch: WatchWeights | None = None
        self._effective: dict[Hashable, torch.Tensor] | None = None
        self._adapters: dict[str, tuple[PlannedAdapter, ...]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> RegionTree:
        """Graphs are not copied: those of the copy are captured when it is called."""
        self.deactivate()
        context = dataclasses.replace(self.context, store=copy.deepcopy(self.context.store, memo))
        return RegionTree(copy.deepcopy(self.module, memo), context, self._boundaries)

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not pickled either."""
        self.deactivate()
        return {"module": self.module, "context": self.context, "boundaries": self._boundaries}

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

    def discover(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[WeightUse]]:
        """Capture what an example needs and return every use of every weight, by its first name.

        Whatever the run leaves behind (random states, buffers, attributes) is undone.
        """
        uses: dict[str, list[WeightUse]] = {}
        with restored_state(self.module), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the user's own call will give them
            if self.root.find_graph(args, kwargs) is None:
                with restored_state(self.module):
                    self.call(args, kwargs)
                uses = self._watch_python(args, kwargs)
        for region in self.regions.values():
            for variant in region.variants:
                for name, found in find_weight_uses(variant.captured.graph_module, region.aliases).items():
                    uses.setdefault(name, []).extend(found)
        return uses

    def record_outline(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Sequence[WeightUse]]:
        """Where the model runs as several graphs: uses of weights in a recording of the example, by first name.

        It tells what flows from one graph to the next, and nothing else: no call ever runs it. Empty where the
        model is one graph, where regions are named (they bound what capturing costs), without values to record,
        and where recording fails.
        """
        if len(self.root.variants) or self._boundaries or is_without_memory(self.module):
            return {}
        holder = nn.Module()
        holder.forward = self.module.forward
        holder.module = self.module
        try:
            call = split_call(args, sort_keywords(kwargs))
            with self.as_written(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                recorded = record_call(holder, call, with_values=True)
        except CaptureError as error:
            logger.debug("no outline of the whole model: %s", error)
            return {}
        return find_weight_uses(recorded, self._aliases)

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
        for name, first in self._aliases.items():
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
    def as_written(self) -> Iterator[None]:
        """Inside, the model is as the user wrote it, without adapters."""
        was_active = self._rewiring.is_active
        self.deactivate()
        try:
            yield
        finally:
            if was_active:
                self._activate()

    def region_of(self, module: nn.Module) -> Region:
        """The region of a module; one also where the module stands at several places."""
        if module not in self.regions:
            path = next(name for name, child in self.module.named_modules() if child is module)
            prefix = f"{path}." if path else ""
            names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
            aliases = {name: self._aliases[prefix + name] for name in names}
            self.regions[module] = Region(path, module, aliases, self)
        return self.regions[module]

    def find_boundary_inside(self, region: Region) -> str | None:
        """The first submodule that is to be a region by itself, so that ``region`` cannot be one graph."""
        prefix = f"{region.path}." if region.path else ""
        return next((name for name in self._boundaries if name.startswith(prefix) and name != region.path), None)

    def find_variants_like(self, region: Region, key: Hashable, call: ModuleCall) -> Iterator[tuple[Region, Variant]]:
        """Graphs of other modules of the same class that answer the same call."""
        for other in list(self.regions.values()):
            if other is not region and type(other.module) is type(region.module):
                variant = other.variants.find(call, key)
                if variant is not None:
                    yield other, variant

    def watching(self, *, paused: bool) -> contextlib.AbstractContextManager[None]:
        """Notes what Python does with weights, while :meth:`discover` wants to know."""
        return contextlib.nullcontext() if self._watch is None else self._watch.watching(paused=paused)

    def run_python(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Run a module's own code with its submodules as regions and its weights adapted."""
        self._activate()
        with without_fast_path(), self.watching(paused=False):
            return self._rewiring.original_forward(module)(*args, **kwargs)

    def _dispatch(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not any(parameter.dim() >= 2 for parameter in module.parameters()):
            return self._rewiring.original_forward(module)(*args, **kwargs)
        return self.region_of(module).run(args, kwargs)

    def _activate(self) -> None:
        if not self._rewiring.is_active:
            self._adapters = self.context.plan.live.by_weight
            weights = {name: first for name, first in self._aliases.items() if first in self._adapters}
            self._rewiring.activate(weights, self._look_up)

    def _look_up(self, name: str) -> torch.Tensor:
        """W + ΔW, made once a call of the model; in backward, where checkpoints compute again, each time."""
        key = (name, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if self._effective is None or torch._C._current_graph_task_id() != -1:
            return self._make_effective(name)
        if key not in self._effective:
            self._effective[key] = self._make_effective(name)
        return self._effective[key]

    def _make_effective(self, name: str) -> torch.Tensor:
        path, _, leaf = name.rpartition(".")
        weight = self.module.get_submodule(path)._parameters[leaf]
        assert weight is not None and self.context.store is not None
        with self.watching(paused=True), torch.autocast(weight.device.type, enabled=False):
            total: torch.Tensor = weight
            for adapter in self._adapters[name]:
                parameters = self.context.store.parameters_of(adapter)
                total = adapter.rescale(total + adapter.delta(parameters).to(weight.dtype), parameters)
            return total

    def _watch_python(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[WeightUse]]:
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
