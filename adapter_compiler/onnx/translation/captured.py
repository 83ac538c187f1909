"""The captured graph of a model's ``forward``, which may be exported where the whole call cannot be.

It is the graph that ``AdaptedModel.capture`` makes, here over the folded weights. It leaves out the code around
``forward``: hooks of the model itself and a ``__call__`` of its class, whose Python (a check that outputs are finite,
a log of their mean) no exporter accepts. If that code changes what the model returns, verification finds it, because
the file is compared with a call of the model.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.fx import GraphModule, Node

from passes.capture.calls import ModuleCall
from passes.capture.capture import capture_call


def capture_forward(module: nn.Module, call: ModuleCall) -> GraphModule:
    """The graph of ``module.forward``: takes the call's tensors one by one, returns each distinct tensor once.

    Raises:
        CaptureError: the module does not capture as one graph, or the graph differs from ``forward``.
    """
    graph_module = capture_call(module, call).graph_module
    output = graph_module.graph.output_node()
    leaves = output.args[0]
    assert isinstance(leaves, (tuple, list))
    output.args = (tuple(dict.fromkeys(leaf for leaf in leaves if _is_tensor(leaf))),)
    graph_module.recompile()
    return graph_module


def _is_tensor(leaf: object) -> bool:
    return isinstance(leaf, Node) and isinstance(leaf.meta.get("val"), torch.Tensor)
