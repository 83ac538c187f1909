"""Call signature and mode → adapted graph, captured on demand.

A graph is right for one call signature, one training mode of every submodule, and the shapes it was
not specialised against. A call that no kept graph accepts is captured; adapters belong to weights,
so all graphs use the same ones.
"""

from __future__ import annotations

import dataclasses
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from adapter_compiler.adapted_graphs import AdaptedGraph, AdapterContext, GraphAdapter
from passes.assumptions import TrackRecord
from passes.calls import ModuleCall
from passes.capture import CapturedGraph

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One adapted graph.

    Attributes:
        captured: the graph as captured, without adapters.
        adapted: the same graph with adapters; what calls run.
        training: whether the module was in training mode.
        inputs: the call's tensors, as in ``x: float32[4, 16]``.
        record: how the assumptions of the graph have held.
    """

    captured: CapturedGraph
    adapted: AdaptedGraph
    training: bool
    inputs: tuple[str, ...]
    record: TrackRecord = dataclasses.field(default_factory=TrackRecord, compare=False)

    def run(self, call: ModuleCall, *, checkpointed: bool = False) -> Any:
        """What the module returns for ``call``."""
        adapted = self.adapted
        graph: Callable[..., Any] = adapted.graph_module if torch.compiler.is_compiling() else adapted.lifted
        if checkpointed and self.training and torch.is_grad_enabled():
            leaves = checkpoint(graph, *call.tensors, use_reentrant=False)
        else:
            leaves = graph(*call.tensors)
        return pytree.tree_unflatten(leaves, self.captured.output_spec)

    @property
    def sites(self) -> frozenset[str]:
        """Names of the sites in the graph."""
        return self.adapted.sites


class VariantCache:
    """The adapted graphs of one module, most recently used last."""

    def __init__(
        self, module: nn.Module, aliases: Mapping[str, str], context: AdapterContext, adapter: GraphAdapter
    ) -> None:
        """An empty cache.

        Args:
            module: whose calls the graphs stand for.
            aliases: names of its parameters → their first names in the whole model.
            context: the adapters.
            adapter: inserts them.
        """
        self._module = module
        self._aliases = aliases
        self._context = context
        self._adapter = adapter
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
        variant = Variant(
            captured=captured,
            adapted=self._adapter.adapt(captured, self._aliases),
            training=self._module.training,
            inputs=tuple(_describe(name, t) for name, t in zip(call.names, call.tensors, strict=True)),
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
            adapted = self._adapter.adapt(variant.captured, self._aliases)
            self._variants[key] = dataclasses.replace(variant, adapted=adapted)

    def exchange_store(self) -> None:
        """Let the kept graphs read their adapters from the context's present store, which is built like the last."""
        for variant in self._variants.values():
            assert self._context.store is not None
            variant.adapted.exchange_store(self._context.store)


def _describe(name: str, tensor: torch.Tensor) -> str:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{name}: {dtype}{list(tensor.shape)}"
