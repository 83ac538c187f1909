"""The operators that one call of a model runs, as a graph: for models that torch.export refuses for how they are made.

torch.export wants to know of every weight, and takes no derivative inside ``forward`` and no exception that the
model itself catches. Recording the operators of a call asks for none of this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from passes.base import CaptureError, make_containers
from passes.capture.calls import ModuleCall
from passes.capture.module_state import restored_state
from passes.capture.quiet import FAKE_TENSOR_LOGGER, quiet_loggers

#: On tensors without values: branches on values fail, so that nothing is frozen silently; shapes stay open.
_WITHOUT_VALUES: dict[str, Any] = {"tracing_mode": "symbolic"}
#: On the example itself: branches go as they go for it, and products keep the operators that the model wrote.
_WITH_VALUES: dict[str, Any] = {"tracing_mode": "real", "pre_dispatch": True, "_error_on_data_dependent_ops": False}


def record_call(module: nn.Module, call: ModuleCall) -> GraphModule:
    """The graph of a call: takes its tensors one by one, returns what the module returns.

    Weights stand at their names in ``module``.

    Raises:
        CaptureError: the call cannot be recorded; perhaps because it depends on values.
    """

    def run(*tensors: torch.Tensor) -> object:
        args, kwargs = call.rebuild(tensors)
        return module(*args, **kwargs)

    return _record(module, run, call.tensors, _WITHOUT_VALUES)


def record_example(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraphModule:
    """The operators that one call runs, as a graph that returns every tensor in the result.

    It tells what this one call did, branches and all, and is not to be run on other values. Arguments may be of any
    kind; tensors that pytrees do not find in them are constants.

    Raises:
        CaptureError: the call cannot be recorded.
    """
    leaves, spec = pytree.tree_flatten((tuple(args), dict(kwargs)))
    positions = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]

    def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
        given = list(leaves)
        for position, tensor in zip(positions, tensors, strict=True):
            given[position] = tensor
        own_args, own_kwargs = pytree.tree_unflatten(given, spec)
        return list(find_tensors(module(*own_args, **own_kwargs)))

    return _record(module, run, [leaves[i] for i in positions], _WITH_VALUES)


def find_tensors(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in a result, also inside objects that pytrees take for leaves."""
    yield from _walk(value, set())


def _walk(value: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor):
            yield leaf
        elif id(leaf) not in seen and not isinstance(leaf, nn.Module) and hasattr(leaf, "__dict__"):
            seen.add(id(leaf))
            yield from _walk(list(vars(leaf).values()), seen)


def _record(
    module: nn.Module, run: Callable[..., object], tensors: Sequence[torch.Tensor], options: Mapping[str, Any]
) -> GraphModule:
    try:
        with restored_state(module), quiet_loggers(FAKE_TENSOR_LOGGER):
            graph_module = make_fx(run, _allow_non_fake_inputs=True, **options)(*tensors)
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
