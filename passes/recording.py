"""The operators that one call of a model runs, as a graph: for models that torch.export refuses for how they are made.

torch.export wants to know of every weight, and takes no derivative inside ``forward`` and no exception that the
model itself catches. Recording the operators of a call asks for none of this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from passes.base import CaptureError, make_containers
from passes.calls import ModuleCall
from passes.module_state import restored_state
from passes.quiet import FAKE_TENSOR_LOGGER, quiet_loggers

#: On tensors without values: branches on values fail, so that nothing is frozen silently; shapes stay open.
_WITHOUT_VALUES: dict[str, Any] = {"tracing_mode": "symbolic"}
#: On the example itself: branches go as they go for it, and products keep the operators that the model wrote.
_WITH_VALUES: dict[str, Any] = {"tracing_mode": "real", "pre_dispatch": True, "_error_on_data_dependent_ops": False}


def record_call(module: nn.Module, call: ModuleCall, *, with_values: bool = False) -> GraphModule:
    """The graph of a call: takes its tensors one by one, returns what the module returns.

    Weights stand at their names in ``module``. With values, the graph tells what this one call did, and is not to
    be run on others.

    Raises:
        CaptureError: the call cannot be recorded; without values, perhaps because it depends on some.
    """

    def run(*tensors: torch.Tensor) -> object:
        args, kwargs = call.rebuild(tensors)
        return module(*args, **kwargs)

    options = _WITH_VALUES if with_values else _WITHOUT_VALUES
    try:
        with restored_state(module), quiet_loggers(FAKE_TENSOR_LOGGER):
            graph_module = make_fx(run, _allow_non_fake_inputs=True, **options)(*call.tensors)
    except Exception as error:  # the model's own code raises what it likes
        reason = " ".join(str(error).split())[:400]
        raise CaptureError(f"{module._get_name()} cannot be traced: {type(error).__name__}: {reason}") from error
    graph_module.graph.eliminate_dead_code()
    _name_weights(graph_module, module)
    graph_module.recompile()
    return graph_module


def _name_weights(graph_module: GraphModule, module: nn.Module) -> None:
    """Call the weights that were recorded as constants as they are called in the module."""
    parameters = dict(module.named_parameters())
    names = {id(tensor): name for name, tensor in (*parameters.items(), *module.named_buffers())}
    recorded = [str(node.target) for node in graph_module.graph.find_nodes(op="get_attr")]
    values = {name: getattr(graph_module, name) for name in recorded}
    for name in {*graph_module._parameters, *graph_module._buffers} - {
        n for n, v in values.items() if id(v) not in names
    }:
        delattr(graph_module, name)
    for node in graph_module.graph.find_nodes(op="get_attr"):
        value = values[str(node.target)]
        if id(value) not in names:
            continue
        node.target = names[id(value)]
        path, _, leaf = node.target.rpartition(".")
        owner = make_containers(graph_module, path)
        if node.target in parameters:
            # The parameters of a ScriptModule are plain tensors.
            is_plain = not isinstance(value, nn.Parameter)
            owner.register_parameter(leaf, nn.Parameter(value.detach(), requires_grad=False) if is_plain else value)
        else:
            owner.register_buffer(leaf, value)
