"""Captured graphs with adapters in them, shared by the regions that are built the same way.

Twins (:mod:`passes.twins`) share one captured graph. As long as their adapters are alike, they share the graph with
adapters and its generated code, too, each over tensors of its own. So such a graph names weights as the region's
module does, and the adapters stand beside the module under the same names.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Hashable, Mapping
from weakref import WeakKeyDictionary

from torch import nn
from torch.fx import Graph, GraphModule

from adapter_compiler.store import AdapterStore
from passes.base import GraphPass, PassManager, bind_graph_module, clone_graph_module, make_containers
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

_STORE = STORE_PREFIX.rstrip(".")


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


class AdaptedGraph:
    """A graph with adapters over the tensors of one region.

    Attributes:
        graph_module: the graph; sites are called by the names that their weights have in the region's module.
        names: those names → the names of the sites in the model.
    """

    def __init__(
        self, graph_module: GraphModule, names: Mapping[str, str], template: AdaptedGraph | None = None
    ) -> None:
        """A graph of its own, or with a ``template`` one that shares the template's graph and code."""
        self.graph_module = graph_module
        self.names = names
        self._template = template

    @functools.cached_property
    def sites(self) -> frozenset[str]:
        """Names in the model of the sites in the graph."""
        return frozenset(in_model for name, in_model in self.names.items() if name in self._inserted)

    @functools.cached_property
    def lifted(self) -> LiftedGraph:
        """The graph with its weights as arguments, which is quicker to call."""
        if self._template is None:
            return LiftedGraph(self.graph_module)
        return self._template.lifted.bind(self.graph_module)

    @functools.cached_property
    def _inserted(self) -> set[str]:
        return find_adapted_sites(self.graph_module) if self._template is None else self._template._inserted

    def exchange_store(self, store: AdapterStore) -> None:
        """Read the adapters from another store, which is built like the present one."""
        setattr(self.graph_module, _STORE, _select_from(store, self.names))
        self.lifted.look_up(self.graph_module)


class GraphAdapter:
    """Inserts the adapters of a model into its captured graphs, into each graph once."""

    def __init__(self, context: AdapterContext) -> None:
        """Nothing is inserted yet."""
        self._context = context
        self._known: WeakKeyDictionary[Graph, dict[Hashable, AdaptedGraph]] = WeakKeyDictionary()

    def use(self, plan: AdapterPlan, store: AdapterStore) -> None:
        """Insert these adapters from now on."""
        self._context.plan, self._context.store = plan, store
        self._known.clear()

    def adapt(self, captured: CapturedGraph, aliases: Mapping[str, str]) -> AdaptedGraph:
        """A captured graph with the adapters of its weights; the graph itself while there are none.

        Args:
            captured: the graph; it stays as it is.
            aliases: names of the parameters of the region's module → their first names in the model.
        """
        own = self._context.plan.restrict_to(aliases.values())
        first: dict[str, str] = {}
        local = {name: first.setdefault(in_model, name) for name, in_model in aliases.items()}
        plan = own.renamed(first)
        names = {renamed.site.name: adapter.site.name for renamed, adapter in zip(plan, own, strict=True)}
        packed = find_packed_weights(captured.graph_module)
        known = self._known.setdefault(captured.graph_module.graph, {})
        key = (plan, frozenset(packed), tuple(local.items()))
        own_children = captured.graph_module._modules.items()
        children = {n: c for n, c in own_children if c is not None and not isinstance(c, GraphModule)}
        if self._context.store is not None:
            children[_STORE] = _select_from(self._context.store, names)
        template = known.get(key)
        if template is not None:
            return AdaptedGraph(bind_graph_module(template.graph_module, children), names, template)
        graph_module = captured.graph_module
        if self._context.store is not None:
            graph_module = clone_graph_module(graph_module)
            setattr(graph_module, _STORE, children[_STORE])
            graph_module = self._insert(graph_module, plan, local, has_packed=bool(packed))
        known[key] = AdaptedGraph(graph_module, names)
        return known[key]

    def _insert(
        self, graph_module: GraphModule, plan: AdapterPlan, aliases: Mapping[str, str], *, has_packed: bool
    ) -> GraphModule:
        passes: list[GraphPass] = [InsertAdaptersPass(plan=plan, aliases=aliases), VerifyAdaptersPass(plan=plan)]
        if self._context.fused:
            recompute = self._context.recompute
            passes += [RecogniseGeluPass(), FuseAdaptersPass(recompute=recompute), SlimActivationsPass()]
        if has_packed:
            passes.append(RecomputeWeightsPass())
        return PassManager(passes=passes)(graph_module).graph_module


def _select_from(store: AdapterStore, names: Mapping[str, str]) -> nn.Module:
    """The store's modules for some sites, under other names."""
    root = nn.Module()
    for name, in_model in names.items():
        path, _, leaf = name.rpartition(".")
        make_containers(root, path).add_module(leaf, store.get_submodule(in_model))
    return root
