"""What an example call does with every weight of a model, in its graphs and in the Python between them."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from adapter_compiler.regions import RegionTree
from passes.base import CaptureError
from passes.calls import sort_keywords, split_call
from passes.module_state import is_without_memory, restored_state
from passes.recording import record_call
from passes.weight_uses import WeightUse, find_weight_uses

logger = logging.getLogger(__name__)


def discover_uses(tree: RegionTree, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, list[WeightUse]]:
    """Capture what an example needs and return every use of every weight, by its first name.

    Whatever the run leaves behind (random states, buffers, attributes) is undone.
    """
    uses: dict[str, list[WeightUse]] = {}
    with restored_state(tree.module), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the user's own call will give them
        if tree.root.find_graph(args, kwargs) is None:
            with restored_state(tree.module):
                tree.call(args, kwargs)
            uses = tree.watch_python(args, kwargs)
    for region in tree.regions.values():
        for variant in region.variants:
            for name, found in find_weight_uses(variant.captured.graph_module, region.aliases).items():
                uses.setdefault(name, []).extend(found)
    return uses


def record_outline(
    tree: RegionTree, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Mapping[str, Sequence[WeightUse]]:
    """Where the model runs as several graphs: uses of weights in a recording of the example, by first name.

    It tells what flows from one graph to the next, and nothing else: no call ever runs it. Empty where the
    model is one graph, where regions are named (they bound what capturing costs), without values to record,
    and where recording fails.
    """
    if len(tree.root.variants) or tree.boundaries or is_without_memory(tree.module):
        return {}
    holder = nn.Module()
    holder.forward = tree.module.forward
    holder.module = tree.module
    try:
        call = split_call(args, sort_keywords(kwargs))
        with tree.as_written(tree.module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            recorded = record_call(holder, call, with_values=True)
    except CaptureError as error:
        logger.debug("no outline of the whole model: %s", error)
        return {}
    return find_weight_uses(recorded, tree.aliases)
