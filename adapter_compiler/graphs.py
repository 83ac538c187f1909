"""A call of an adapted model as one fx graph with its adapters in it, as the rewrite passes make it.

For looking at, for running, for whatever takes graphs. Calls of the model itself do not run it: Python knows when an
attribute, a hook or a mode is another than in the example, and a graph does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from adapter_compiler.dispatch.scope import base_weights
from adapter_compiler.interop.transformers_caches import register_caches
from adapter_compiler.store import AdapterStore
from passes.base import GraphPass, PassManager, clone_graph_module, make_containers
from passes.calls import sort_keywords, split_call
from passes.capture import capture_call
from passes.fuse_adapters import FuseAdaptersPass
from passes.insert_adapters import STORE_PREFIX, InsertAdaptersPass
from passes.packed_weights import find_packed_weights
from passes.plan import AdapterPlan
from passes.quantise_weights import RecomputeWeightsPass
from passes.recognise_gelu import RecogniseGeluPass
from passes.slim_activations import SlimActivationsPass
from passes.verify import VerifyAdaptersPass
from passes.weight_uses import find_parameter_aliases

_STORE = STORE_PREFIX.rstrip(".")


def capture_adapted(
    module: nn.Module,
    plan: AdapterPlan,
    store: AdapterStore,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    fused: bool,
    recompute: bool,
) -> GraphModule:
    """The graph of one call with the adapters inserted.

    Args:
        module: the model; its present training mode is that of the graph.
        plan: the adapters.
        store: their parameters, which the graph shares.
        args: positional arguments of the call.
        kwargs: its keyword arguments.
        fused: whether each adapter and its base layer become one node.
        recompute: whether these compute cheap activations again in backward.

    Returns:
        A module that takes the tensors of the call one by one, keywords by name, and returns a tuple of the result's
        leaves. It is right for calls that differ from this one in sizes and values of tensors only.

    Raises:
        CaptureError: the call does not capture as one graph that computes the same.
    """
    register_caches()
    with base_weights():
        captured = capture_call(module, split_call(args, sort_keywords(kwargs)))
    graph_module = clone_graph_module(captured.graph_module)
    setattr(graph_module, _STORE, _share(store, plan))
    aliases = find_parameter_aliases(module)
    passes: list[GraphPass] = [InsertAdaptersPass(plan=plan, aliases=aliases), VerifyAdaptersPass(plan=plan)]
    if fused:
        passes += [RecogniseGeluPass(), FuseAdaptersPass(recompute=recompute), SlimActivationsPass()]
    if find_packed_weights(graph_module):
        passes.append(RecomputeWeightsPass())
    return PassManager(passes=passes)(graph_module).graph_module


def _share(store: AdapterStore, plan: AdapterPlan) -> nn.Module:
    """The store's modules for each site, without the store's own ways of moving them."""
    root = nn.Module()
    for adapter in plan:
        path, _, leaf = adapter.site.name.rpartition(".")
        make_containers(root, path).add_module(leaf, store.get_submodule(adapter.site.name))
    return root
