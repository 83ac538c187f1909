"""Call signature and mode → adapted graph, captured on demand.

A graph is right for one call signature, one training mode of every submodule, and the shapes it was
not specialised against. A call that no kept graph accepts is captured; adapters belong to weights,
so all graphs use the same ones.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from adapter_compiler.store import AdapterStore
from passes.assumptions import TrackRecord
from passes.base import GraphPass, PassManager, clone_graph_module
from passes.calls import ModuleCall
from passes.capture import CapturedGraph
from passes.fuse_adapters import FuseAdaptersPass
from passes.insert_adapters import STORE_PREFIX, InsertAdaptersPass, find_adapted_sites
from passes.lift_weights import LiftedGraph
from passes.packed_weights import find_packed_weights
from passes.plan import AdapterPlan
from passes.quantise_weights import RecomputeWeightsPass
from passes.recognise_gelu import RecogniseGeluPass
from passes.slim_activations import SlimActivationsPass
from passes.verify import VerifyAdaptersPass

logger = logging.getLogger(__name__)


@dataclasses.dataclass(kw_only=True)
class AdapterContext:
    """What all graphs of a model share. The plan and the store come when sites have been found.

    Attributes:
        plan: the adapters.
        store: their parameters.
        limit: how many graphs each region keeps.
        fused: whether each adapter and its base layer run as one function.
        recompute: whether fused adapters compute cheap activations again in backward instead of keeping them.
        checkpointed: whether a region's activations are computed again in backward instead of kept.
    """

    plan: AdapterPlan = dataclasses.field(default_factory=lambda: AdapterPlan(adapters=()))
    store: AdapterStore | None = None
    limit: int
    fused: bool
    recompute: bool = False
    checkpointed: bool = False

    def adapt(self, captured: CapturedGraph, aliases: Mapping[str, str]) -> GraphModule:
        """A copy of a captured graph with the adapters inserted; the graph itself while there are none."""
        if self.store is None:
            return captured.graph_module
        graph_module = clone_graph_module(captured.graph_module)
        packed = find_packed_weights(graph_module)
        setattr(graph_module, STORE_PREFIX.rstrip("."), self.store)
        plan = self.plan.restrict_to(aliases.values())
        passes: list[GraphPass] = [
            InsertAdaptersPass(plan=plan, aliases=aliases),
            VerifyAdaptersPass(plan=plan),
        ]
        if self.fused:
            passes += [RecogniseGeluPass(), FuseAdaptersPass(recompute=self.recompute), SlimActivationsPass()]
        if packed:
            passes.append(RecomputeWeightsPass())
        return PassManager(passes=passes)(graph_module).graph_module


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One adapted graph.

    Attributes:
        captured: the graph as captured, without adapters.
        adapted: the same graph with adapters; what calls run.
        training: whether the module was in training mode.
        inputs: the call's tensors, as in ``x: float32[4, 16]``.
        sites: names of the sites in the graph.
        record: how the assumptions of the graph have held.
    """

    captured: CapturedGraph
    adapted: GraphModule
    training: bool
    inputs: tuple[str, ...]
    sites: frozenset[str]
    record: TrackRecord = dataclasses.field(default_factory=TrackRecord, compare=False)

    def run(self, call: ModuleCall, *, checkpointed: bool = False) -> Any:
        """What the module returns for ``call``."""
        graph: Callable[..., Any] = self.adapted if torch.compiler.is_compiling() else self.lifted
        if checkpointed and self.training and torch.is_grad_enabled():
            leaves = checkpoint(graph, *call.tensors, use_reentrant=False)
        else:
            leaves = graph(*call.tensors)
        return pytree.tree_unflatten(leaves, self.captured.output_spec)

    @functools.cached_property
    def lifted(self) -> LiftedGraph:
        """The adapted graph with its weights as arguments, which is quicker to call."""
        return LiftedGraph(self.adapted)


class VariantCache:
    """The adapted graphs of one module, most recently used last."""

    def __init__(self, module: nn.Module, aliases: Mapping[str, str], context: AdapterContext) -> None:
        """An empty cache.

        Args:
            module: whose calls the graphs stand for.
            aliases: names of its parameters → their first names in the whole model.
            context: the adapters.
        """
        self._module = module
        self._aliases = aliases
        self._context = context
        self._variants: OrderedDict[tuple[Hashable, int], Variant] = OrderedDict()
        self._captures = 0

    def __len__(self) -> int:
        return len(self._variants)

    def __iter__(self) -> Iterator[Variant]:
        return iter(self._variants.values())

    def key_of(self, call: ModuleCall) -> Hashable:
        """Equal for two calls that the same graph may serve, shapes apart."""
        return (call.key, tuple(module.training for module in self._module.modules()))

    def find(self, call: ModuleCall, key: Hashable) -> Variant | None:
        """The kept graph that is right for ``call``, or ``None``."""
        for kept, variant in self._variants.items():
            if kept[0] == key and variant.captured.accepts(call.tensors):
                self._variants.move_to_end(kept)
                return variant
        return None

    def add(self, call: ModuleCall, key: Hashable, captured: CapturedGraph) -> Variant:
        """Insert the adapters into a copy of a fresh capture of ``call`` and keep both."""
        adapted = self._context.adapt(captured, self._aliases)
        variant = Variant(
            captured=captured,
            adapted=adapted,
            training=self._module.training,
            inputs=tuple(_describe(name, t) for name, t in zip(call.names, call.tensors, strict=True)),
            sites=frozenset(find_adapted_sites(adapted)),
        )
        self._captures += 1
        self._variants[(key, self._captures)] = variant
        logger.info("captured %s for %s", "train" if variant.training else "eval", ", ".join(variant.inputs))
        if len(self._variants) > self._context.limit:
            _, dropped = self._variants.popitem(last=False)
            logger.warning(
                "more than max_variants=%d call signatures and shapes; dropped the graph for %s. If each call has "
                "new Python values among its arguments, pass them as tensors",
                self._context.limit,
                ", ".join(dropped.inputs),
            )
        return variant

    def drop(self, variant: Variant) -> Hashable:
        """Forget a graph; returns the key of the calls that it served."""
        kept = next(kept for kept, other in self._variants.items() if other is variant)
        del self._variants[kept]
        return kept[0]

    def rebuild(self) -> None:
        """Insert the context's present adapters into every kept graph, without capturing anew."""
        for key, variant in self._variants.items():
            adapted = self._context.adapt(variant.captured, self._aliases)
            sites = frozenset(find_adapted_sites(adapted))
            self._variants[key] = dataclasses.replace(variant, adapted=adapted, sites=sites)

    def exchange_store(self) -> None:
        """Let the kept graphs read their adapters from the context's present store, which is built like the last."""
        for variant in self._variants.values():
            setattr(variant.adapted, STORE_PREFIX.rstrip("."), self._context.store)
            variant.lifted.look_up(variant.adapted)


def _describe(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name}: {dtype}{list(tensor.shape)}"
