"""Count the tensor values that a module's Python reads during a trace, and check that the graph reads them too.

torch.export keeps a read (``t.item()``, ``int(t)``) as a symbol. It loses the read silently if Python turns the value
into something else, such as text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.overrides import TorchFunctionMode

from passes.base import CaptureError, find_graph_modules

aten = torch.ops.aten

#: Methods that return a tensor's value to Python.
_READS = {"item", "__bool__", "__int__", "__float__", "__index__", "__complex__", "tolist", "numpy", "__format__"}
_NODES = {aten._local_scalar_dense.default, aten.item.default}


class CountReads(TorchFunctionMode):
    """Counts the reads of tensor values inside this context.

    Attributes:
        count: the number of reads so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run the function, and count it if it reads a value."""
        self.count += getattr(func, "__name__", "") in _READS
        return func(*args, **(kwargs or {}))


def assert_reads_kept(owner: str, graph_module: GraphModule, count: int) -> None:
    """Raise :class:`CaptureError` if the graph computes with fewer values than Python read during the trace.

    Args:
        owner: the module's name, for the message.
        graph_module: the captured graph.
        count: the number of reads, from :class:`CountReads`.
    """
    nodes = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes]
    kept = sum(node.target in _NODES and _is_computed_with(node) for node in nodes)
    if kept < count:
        raise CaptureError(
            f"{owner} does not capture as one graph: its Python code reads {count} values of tensors, but the graph "
            f"computes with {kept} of them; expected code that computes with tensors instead"
        )


def _is_computed_with(node: Node) -> bool:
    """Whether anything other than an assertion uses the value."""
    if node.target is aten._assert_scalar.default:
        return False
    if node.op == "output" or isinstance(node.meta.get("val"), torch.Tensor):
        return True
    return any(_is_computed_with(user) for user in node.users)
