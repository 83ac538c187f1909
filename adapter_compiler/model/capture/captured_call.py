"""Capture a call of an adapted model as one fx graph that contains the adapters.

The graph is for inspection and for tools that take graphs. Calls of the model itself do not run it: Python code notices
when an attribute, a hook or a mode differs from the example, and a graph does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.fx import GraphModule

from adapter_compiler.adapters.parameters.adapter_parameters import AdapterParameters
from adapter_compiler.model.capture.transformers_caches import register_caches
from adapter_compiler.model.dispatch.scope import base_weights
from passes.adapt.fold_adapters import FoldAdaptersPass
from passes.adapt.insert_adapters import PARAMETERS_PREFIX, InsertAdaptersPass
from passes.adapt.verify_adapters import VerifyAdaptersPass
from passes.analysis.weight_uses import find_parameter_aliases
from passes.base import GraphPass, PassManager, clone_graph_module, make_containers
from passes.capture.calls import sort_keywords, split_call
from passes.capture.capture import capture_call
from passes.fuse.fuse_adapters import FuseAdaptersPass
from passes.fuse.memory_efficient_activations import MemoryEfficientActivationsPass
from passes.fuse.recognize_gelu import RecognizeGeluPass
from passes.planning.plan import AdapterPlan
from passes.quantize.packed_weights import find_packed_weights
from passes.quantize.recompute_weights import RecomputeWeightsPass

#: The submodule of the graph module that has the adapters' parameters.
_PARAMETERS = PARAMETERS_PREFIX.rstrip(".")


def capture_adapted(
    module: nn.Module,
    plan: AdapterPlan,
    adapter_parameters: AdapterParameters,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    fused: bool,
    recompute: bool,
    folded: bool = False,
) -> GraphModule:
    """The graph of one call with the adapters inserted.

    Args:
        module: the model; the graph has its present training mode.
        plan: the adapters.
        adapter_parameters: their parameters, which the graph shares.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        fused: whether each adapter and its base layer become one node.
        recompute: whether these nodes recompute cheap activations in backward.
        folded: whether the adapters are merged into the graph's own copies of the weights; no adapter node is left.

    Returns:
        A module that takes the tensors of the call as single arguments, keywords by name, and returns a tuple of the
        result's tensors. It is valid for calls that differ from this one only in the sizes and values of tensors.

    Raises:
        CaptureError: the call cannot be captured as one graph that computes the same.
        SiteError: an update depends on the call.
    """
    for adapter in plan:
        adapter.assert_matrix()
    register_caches()
    with base_weights():
        captured = capture_call(module, split_call(args, sort_keywords(kwargs)))
    graph_module = clone_graph_module(captured.graph_module)
    setattr(graph_module, _PARAMETERS, _share(adapter_parameters, plan))
    aliases = find_parameter_aliases(module)
    passes: list[GraphPass] = [InsertAdaptersPass(plan=plan, aliases=aliases), VerifyAdaptersPass(plan=plan)]
    if folded:
        passes.append(FoldAdaptersPass(plan=plan))
    elif fused:
        passes += [RecognizeGeluPass(), FuseAdaptersPass(recompute=recompute), MemoryEfficientActivationsPass()]
    if find_packed_weights(graph_module):
        passes.append(RecomputeWeightsPass())
    return PassManager(passes=passes)(graph_module).graph_module


def _share(adapter_parameters: AdapterParameters, plan: AdapterPlan) -> nn.Module:
    """The modules that have the parameters of each site, in a root without the ``_apply`` of ``AdapterParameters``."""
    root = nn.Module()
    for adapter in plan:
        path, _, leaf = adapter.site.name.rpartition(".")
        make_containers(root, path).add_module(leaf, adapter_parameters.get_submodule(adapter.site.name))
    return root
