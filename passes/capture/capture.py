"""Turn a module call into an fx graph over the module's own weights, and prove it right.

The module is exported with :func:`torch.export.export` behind a wrapper that takes the tensors of
the call as one flat list. The graph that comes back is made of ATen operators, trains, and refers
to the module's own Parameter and buffer objects under ``module.<qualified name>``; nothing is
copied. Dimensions are left symbolic as far as the model allows: all of them, else the first one
of each tensor, else none.

Every capture is run against the module on the same example under the same random state, and on other values;
outputs, buffers and gradients must agree. What export cannot express it refuses, and so does this function; so it
does where Python read more values than the graph asks for.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from passes.base import CaptureError
from passes.capture.assumptions import values_of_example
from passes.capture.calls import ModuleCall, flatten_result
from passes.capture.module_state import (
    HOOK_KINDS,
    canonical_kernels,
    is_known_hook,
    restored_state,
    without_idle_moves,
)
from passes.capture.quiet import FAKE_TENSOR_LOGGER, PROCESS_LOCK, quiet_loggers
from passes.capture.read_values import CountReads, assert_reads_kept
from passes.capture.self_check import Observation, assert_same, change_values, observe_eager, observe_run
from passes.quantize.packed_weights import find_packed_weights, hollow_weights, set_parameter

logger = logging.getLogger(__name__)

#: How torch.export names a branch that it cannot decide.
_DEPENDS_ON_VALUES = "GuardOnDataDependentSymNode"
#: What the model's own code or an operator raises, rather than torch.export.
_OF_THE_MODEL = ("ValueError", "IndexError", "RuntimeError: shape", "RuntimeError: The size")
#: They warn of sizes that a dimension is fixed to and of branches on values, both of which are found and reported here.
_LOGGERS = ("torch._export.non_strict_utils", "torch.fx.experimental.symbolic_shapes")
#: Where the captured module's parameters and buffers stand in a captured graph.
MODULE_PREFIX = "module."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionBound:
    """What one dimension of one input may be: a fixed size, or a symbol with a least and greatest size."""

    symbol: str | None
    least: int
    greatest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """An fx graph that computes one call of a module.

    Attributes:
        graph_module: takes the tensors of the call as flat positional arguments, returns a tuple.
        output_spec: how the returned leaves nest.
        bounds: per input tensor, per dimension, what sizes the graph is right for.
        dynamic: ``"all"``, ``"first"`` or ``"none"``: which dimensions were left symbolic.
        largest_error: greatest departure from eager seen in the self-check.
    """

    graph_module: GraphModule
    output_spec: pytree.TreeSpec
    bounds: tuple[tuple[DimensionBound, ...], ...]
    guards: Callable[..., Any] | None
    dynamic: str
    largest_error: float

    def accepts(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the graph is right for tensors of these shapes. Sizes 0 and 1 are never generalized to."""
        symbols: dict[str, int] = {}
        for tensor, bounds in zip(tensors, self.bounds, strict=True):
            for size, bound in zip(tensor.shape, bounds, strict=True):
                if not bound.least <= size <= bound.greatest:
                    return False
                if bound.symbol is not None and symbols.setdefault(bound.symbol, size) != size:
                    return False
        if self.guards is None:
            return True
        try:
            self.guards(*tensors)
        except AssertionError:
            return False
        return True


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportedCall:
    """What torch.export made of one call; its inputs and outputs are flat.

    Attributes:
        program: the exported program; the module's weights are its ``module.<qualified name>``.
        output_spec: how the returned leaves nest.
        bounds: per input tensor, per dimension, what sizes the program is right for.
        dynamic: ``"all"``, ``"first"`` or ``"none"``: which dimensions were left symbolic.
        reads: how many values of tensors Python read in the trace.
    """

    program: ExportedProgram
    output_spec: pytree.TreeSpec
    bounds: tuple[tuple[DimensionBound, ...], ...]
    dynamic: str
    reads: int = 0


#: Which dimensions may be left symbolic: all, the first one of each tensor, or none.
DYNAMIC_CHOICES = ("all", "first", "none")


#: Those that are tried with the values of the example where none exports without.
ASSUMED_CHOICES = ("all", "first")


def export_call(
    module: nn.Module, call: ModuleCall, choices: Sequence[str] = DYNAMIC_CHOICES, *, assume: bool = False
) -> ExportedCall:
    """Export ``module`` for ``call`` in its present training mode, with as many symbolic dimensions as work.

    ``choices`` are tried in order; the first that exports counts. With ``assume``, what depends on values
    is then decided as in the example, and asserted.

    Raises:
        CaptureError: the module does not export as one graph, or does not run on this call at all.
    """
    failures: list[str] = []
    found = _export_first(module, call, choices, failures)
    reason = (
        failures[0] + (f" (with fixed shapes: {failures[-1]})" if failures[-1] != failures[0] else "")
        if failures
        else ""
    )
    if found is None and assume and any(_is_worth_values(failure) for failure in failures):
        failures = []
        with PROCESS_LOCK, values_of_example():
            found = _export_first(module, call, [choice for choice in ASSUMED_CHOICES if choice in choices], failures)
        reason += f" (with the values of the example: {failures[0]})" if failures else ""
    if found is not None:
        return found
    raise CaptureError(
        f"{module._get_name()} does not capture as one graph: {reason}; "
        "torch.export needs control flow that does not depend on tensor values"
    )


def _is_worth_values(failure: str) -> bool:
    """Whether a trace with values may get further: a branch depends on them, or code failed that runs in eager."""
    return _DEPENDS_ON_VALUES in failure or failure.startswith(_OF_THE_MODEL)


def _export_first(
    module: nn.Module, call: ModuleCall, choices: Sequence[str], failures: list[str]
) -> ExportedCall | None:
    for dynamic in choices:
        wrapper = _FlatCall(module, call)
        try:
            program = _export(wrapper, call, dynamic)
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises whatever the model's own code raises
            failures.append(_first_lines(error))
            logger.debug("capture with %s dimensions dynamic failed: %s", dynamic, error)
            continue
        seen = wrapper.seen
        assert seen.spec is not None
        placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        inputs = [placeholders[name] for name in program.graph_signature.user_inputs]
        bounds = tuple(_bounds(node.meta["val"], program.range_constraints) for node in inputs)
        return ExportedCall(program=program, output_spec=seen.spec, bounds=bounds, dynamic=dynamic, reads=seen.reads)
    return None


def capture_call(module: nn.Module, call: ModuleCall) -> CapturedGraph:
    """Capture ``module.forward`` for ``call`` in its present training mode and check the result against eager.

    Hooks of ``module`` itself are not part of the graph: whoever calls the graph runs them. The graph is right for
    calls that differ from this one in sizes and values of tensors, while all else that the module's Python looks at
    (attributes, modes, globals) is as it was.

    Raises:
        CaptureError: the module does not capture as one graph, a submodule has hooks whose Python
            would be lost, values that Python read are lost in the graph, or the graph departs from eager.
    """
    _refuse_inner_hooks(module)
    expected = observe_eager(module, call)
    packed = find_packed_weights(module)
    exported = export_call(module, call)
    captured = _to_captured_graph(exported)
    for name, parameter in packed.items():
        if _is_used(captured.graph_module, MODULE_PREFIX + name):
            set_parameter(captured.graph_module, MODULE_PREFIX + name, parameter)
    assert_reads_kept(type(module).__name__, captured.graph_module, exported.reads)
    captured = check_against_eager(module, call, captured, expected)
    _check_on_other_values(module, call, captured)
    return captured


def _check_on_other_values(module: nn.Module, call: ModuleCall, captured: CapturedGraph) -> None:
    """Compare once more, on values that the example does not have, if the module accepts them."""
    other = dataclasses.replace(call, tensors=tuple(t.requires_grad_(o.requires_grad) for t, o in _change_all(call)))
    try:
        expected = observe_eager(module, other)
    except Exception as error:  # the module's own code may refuse such values in its own way
        logger.debug("%s does not run on other values: %s", type(module).__name__, error)
        return
    check_against_eager(module, other, captured, expected)


def _change_all(call: ModuleCall) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(change_values(tensor), tensor) for tensor in call.tensors]


def _is_used(graph_module: GraphModule, target: str) -> bool:
    return any(node.target == target for node in graph_module.graph.find_nodes(op="get_attr"))


def check_against_eager(
    module: nn.Module, call: ModuleCall, captured: CapturedGraph, expected: Observation | None = None
) -> CapturedGraph:
    """The graph with its largest departure from eager in outputs, buffers and gradients.

    Args:
        module: what the graph stands for.
        call: the arguments of both runs; they start from the same random state.
        captured: the graph.
        expected: what eager gives, if it is known.

    Raises:
        CaptureError: the departure is beyond the tolerance of the dtype, or a graph cannot keep what the module keeps.
    """
    expected = observe_eager(module, call) if expected is None else expected
    found = observe_run(module, call, lambda: list(captured.graph_module(*call.tensors)))
    return dataclasses.replace(captured, largest_error=assert_same(type(module).__name__, found, expected))


def _refuse_inner_hooks(module: nn.Module) -> None:
    for name, child in module.named_modules():
        hooks = [hook for kind in HOOK_KINDS for hook in getattr(child, kind, {}).values()]
        foreign = [hook for hook in hooks if not is_known_hook(hook)]
        if child is not module and foreign:
            hook = getattr(foreign[0], "__name__", foreign[0])
            raise CaptureError(
                f"submodule {name} of {type(module).__name__} has a hook ({hook}), whose Python a graph would lose"
            )


class _SeenOutput:
    """Carries the nesting of the result, and what was read, out of the trace, where plain attributes are put back."""

    spec: pytree.TreeSpec | None = None
    reads: int = 0


class _FlatCall(nn.Module):
    """Calls a module's ``forward`` with a flat list of tensors and returns a flat tuple; what export sees."""

    def __init__(self, module: nn.Module, call: ModuleCall) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.call = call
        self.seen = _SeenOutput()

    def forward(self, tensors: list[torch.Tensor]) -> tuple[Any, ...]:
        args, kwargs = self.call.rebuild(tensors)
        with CountReads() as reads:
            result = self.module.forward(*args, **kwargs)
        leaves, self.seen.spec = flatten_result(result)
        self.seen.reads = reads.count
        return tuple(leaves)


def _export(wrapper: _FlatCall, call: ModuleCall, dynamic: str) -> ExportedProgram:
    dims = [
        {i: Dim.AUTO if dynamic == "all" or (dynamic == "first" and i == 0) else Dim.STATIC for i in range(t.dim())}
        for t in call.tensors
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(PROCESS_LOCK)
        stack.enter_context(canonical_kernels())
        stack.enter_context(restored_state(wrapper.module))
        stack.enter_context(hollow_weights(wrapper.module))
        stack.enter_context(without_idle_moves())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(quiet_loggers(*_LOGGERS, level=logging.ERROR))
        stack.enter_context(quiet_loggers(FAKE_TENSOR_LOGGER))
        stack.enter_context(torch.enable_grad())
        return torch.export.export(wrapper, (list(call.tensors),), dynamic_shapes=(dims,), strict=False)


def _to_captured_graph(call: ExportedCall) -> CapturedGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = call.program.module()
    assert isinstance(exported, GraphModule)
    guards = getattr(exported, "_guards_fn", None)
    graph = exported.graph
    for node in reversed(list(graph.nodes)):
        is_guard = node.op == "call_module" and node.target == "_guards_fn"
        if (
            is_guard
            or node.target is torch.ops.aten._assert_tensor_metadata.default
            or (node.op == "get_attr" and not node.users)
        ):
            graph.erase_node(node)
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0], is_leaf=lambda leaf: leaf is None)),)
    graph.set_codegen(CodeGen())
    graph_module = GraphModule(exported, graph)
    return CapturedGraph(
        graph_module=graph_module,
        output_spec=call.output_spec,
        bounds=call.bounds,
        guards=None if guards is None else guards.forward,
        dynamic=call.dynamic,
        largest_error=float("nan"),
    )


def _bounds(example: torch.Tensor, ranges: Any) -> tuple[DimensionBound, ...]:
    return tuple(_bound(size, ranges) for size in example.shape)


def _bound(size: int | torch.SymInt, ranges: Any) -> DimensionBound:
    expression: Any = None if isinstance(size, int) else size.node.expr
    if isinstance(size, int) or expression.is_number:
        return DimensionBound(symbol=None, least=int(size), greatest=int(size))
    limits = ranges.get(expression)
    # Export decides branches on "size is 0 or 1" for sizes of two or more, so those stay other graphs.
    least = 2 if limits is None else max(2, int(limits.lower))
    finite = limits is not None and limits.upper.is_finite
    return DimensionBound(symbol=str(expression), least=least, greatest=float(limits.upper) if finite else float("inf"))


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return f"{type(error).__name__}: {text[:400]}"
