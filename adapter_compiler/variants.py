"""Call signature and mode → adapted graph, captured on demand.

A graph is right for one call signature, one training mode of every submodule, and the shapes it was
not specialised against. A call that no kept graph accepts is captured; adapters belong to weights,
so all graphs use the same ones.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from adapter_compiler.store import AdapterStore
from passes.base import GraphPass, PassManager, clone_graph_module
from passes.calls import ModuleCall, sort_keywords, split_call
from passes.capture import CapturedGraph, capture_call
from passes.fuse_adapters import FuseAdaptersPass
from passes.insert_adapters import STORE_PREFIX, InsertAdaptersPass, find_adapted_sites
from passes.plan import AdapterPlan
from passes.verify import VerifyAdaptersPass
from passes.weight_uses import find_parameter_aliases

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One adapted graph.

    Attributes:
        captured: the graph as captured, without adapters.
        adapted: the same graph with adapters; what calls run.
        training: whether the model was in training mode.
        inputs: the call's tensors, as in ``x: float32[4, 16]``.
        sites: names of the sites in the graph.
    """

    captured: CapturedGraph
    adapted: GraphModule
    training: bool
    inputs: tuple[str, ...]
    sites: frozenset[str]


class VariantCache:
    """The adapted graphs of one module, most recently used last."""

    def __init__(self, module: nn.Module, store: AdapterStore, plan: AdapterPlan, limit: int, *, fused: bool) -> None:
        """An empty cache that keeps up to ``limit`` graphs, with fused adapters or as inserted."""
        self._fused = fused
        self._module = module
        self._store = store
        self._plan = plan
        self._limit = limit
        self._variants: OrderedDict[tuple[Hashable, int], Variant] = OrderedDict()
        self._captures = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> VariantCache:
        """Graphs are not copied: those of the copy are captured when it is called."""
        return VariantCache(
            copy.deepcopy(self._module, memo),
            copy.deepcopy(self._store, memo),
            copy.deepcopy(self._plan, memo),
            self._limit,
            fused=self._fused,
        )

    def __getstate__(self) -> dict[str, Any]:
        """Graphs are not pickled either."""
        return {**self.__dict__, "_variants": OrderedDict()}

    def __len__(self) -> int:
        return len(self._variants)

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._variants.values())

    def clear(self, plan: AdapterPlan) -> None:
        """Forget every graph, because weights moved to another device or dtype; ``plan`` has the new ones."""
        self._plan = plan
        self._variants.clear()

    def run(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Call the module with adapters.

        Raises:
            CaptureError: no kept graph accepts the call, and it does not capture.
        """
        call = split_call(args, sort_keywords(kwargs))
        variant = self.find(call) or self.add(call, capture_call(self._module, call))
        leaves = variant.adapted(*call.tensors)
        return pytree.tree_unflatten(leaves, variant.captured.output_spec)

    def find(self, call: ModuleCall) -> Variant | None:
        """The kept graph that is right for ``call``, or ``None``."""
        wanted = self._key(call)
        for key, variant in self._variants.items():
            if key[0] == wanted and variant.captured.accepts(call.tensors):
                self._variants.move_to_end(key)
                return variant
        return None

    def add(self, call: ModuleCall, captured: CapturedGraph) -> Variant:
        """Insert the adapters into a copy of a fresh capture of ``call`` and keep both."""
        adapted = self._adapt(captured)
        variant = Variant(
            captured=captured,
            adapted=adapted,
            training=self._module.training,
            inputs=tuple(_describe(name, t) for name, t in zip(call.names, call.tensors, strict=True)),
            sites=frozenset(find_adapted_sites(adapted)),
        )
        self._captures += 1
        self._variants[(self._key(call), self._captures)] = variant
        logger.info("captured %s for %s", "train" if variant.training else "eval", ", ".join(variant.inputs))
        if len(self._variants) > self._limit:
            _, dropped = self._variants.popitem(last=False)
            logger.warning(
                "more than max_variants=%d call signatures and shapes; dropped the graph for %s. If each call has "
                "new Python values among its arguments, pass them as tensors",
                self._limit,
                ", ".join(dropped.inputs),
            )
        return variant

    def rebuild(self, plan: AdapterPlan) -> None:
        """Insert the adapters of another plan into every kept graph, without capturing anew."""
        self._plan = plan
        for key, variant in self._variants.items():
            adapted = self._adapt(variant.captured)
            sites = frozenset(find_adapted_sites(adapted))
            self._variants[key] = dataclasses.replace(variant, adapted=adapted, sites=sites)

    def _adapt(self, captured: CapturedGraph) -> GraphModule:
        graph_module = clone_graph_module(captured.graph_module)
        setattr(graph_module, STORE_PREFIX.rstrip("."), self._store)
        insert = InsertAdaptersPass(plan=self._plan, aliases=find_parameter_aliases(self._module))
        passes: list[GraphPass] = [insert, VerifyAdaptersPass(plan=self._plan)]
        if self._fused:
            passes.append(FuseAdaptersPass())
        return PassManager(passes=passes)(graph_module).graph_module

    def _key(self, call: ModuleCall) -> Hashable:
        modes = tuple(module.training for module in self._module.modules())
        return (call.key, modes)


def _describe(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name}: {dtype}{list(tensor.shape)}"
