"""Capture a module call as an fx graph that uses the module's own weights, and check the graph against the module.

The module is exported with :func:`torch.export.export`, wrapped so that it takes the tensors of the call as one flat
list. The graph consists of ATen operators, can be trained, and refers to the module's own Parameter and buffer objects
under ``module.<qualified name>``; nothing is copied. As many dimensions stay symbolic as the model allows: all of
them, else the first one of each tensor, else none.

Every graph is compared with the module on the example and on other values, under the same random state: outputs,
buffers and gradients must agree. Refused are modules that export does not support, and modules whose Python reads
values that the graph does not read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen

from passes.base import CaptureError
from passes.capture.assumptions import values_of_example
from passes.capture.calls import ModuleCall, flatten_result
from passes.capture.module_state import (
    HOOK_KINDS,
    canonical_kernels,
    is_known_hook,
    restored_state,
    without_redundant_moves,
)
from passes.capture.quiet import PROCESS_LOCK, quiet_loggers
from passes.capture.read_values import CountReads, assert_reads_kept
from passes.capture.self_check import Observation, assert_same, change_values, observe_eager, observe_run
from passes.compat import EXPORT_LOGGERS, FAKE_TENSOR_LOGGER, pytree, take_guards
from passes.quantize.packed_weights import find_packed_weights, set_parameter, weights_without_storage

logger = logging.getLogger(__name__)

#: The error of torch.export for a branch that it cannot decide.
_DEPENDS_ON_VALUES = "GuardOnDataDependentSymNode"
#: Beginnings of errors that the model's own code or an operator raises, not torch.export.
_MODEL_ERRORS = ("ValueError", "IndexError", "RuntimeError: shape", "RuntimeError: The size")
#: Prefix of the module's parameters and buffers in a captured graph.
MODULE_PREFIX = "module."


@dataclasses.dataclass(frozen=True, kw_only=True)
class DimensionBound:
    """The sizes that one dimension of one input may have.

    Attributes:
        symbol: dimensions with the same symbol must have equal sizes; ``None`` for a fixed size.
        least: the smallest size.
        greatest: the largest size, possibly infinite.
    """

    symbol: str | None
    least: int
    greatest: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class CapturedGraph:
    """An fx graph that computes one call of a module.

    Attributes:
        graph_module: takes the tensors of the call as flat positional arguments, returns a tuple.
        output_spec: the nesting of the returned leaves.
        bounds: for each dimension of each input tensor, the sizes that the graph is valid for.
        guards: raises ``AssertionError`` for other sizes, as the exported program checks them; ``None`` if unknown.
        dynamic: ``"all"``, ``"first"`` or ``"none"``: the dimensions that are symbolic.
        largest_error: the largest difference from eager in the self-check.
    """

    graph_module: GraphModule
    output_spec: pytree.TreeSpec
    bounds: tuple[tuple[DimensionBound, ...], ...]
    guards: Callable[..., Any] | None
    dynamic: str
    largest_error: float

    def accepts(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the graph is valid for tensors of these shapes; symbolic sizes never include 0 and 1."""
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
    """The result of torch.export for one call, with flat inputs and outputs.

    Attributes:
        program: the exported program; the module's weights have the names ``module.<qualified name>``.
        output_spec: the nesting of the returned leaves.
        bounds: for each dimension of each input tensor, the sizes that the program is valid for.
        dynamic: ``"all"``, ``"first"`` or ``"none"``: the dimensions that are symbolic.
        reads: the number of tensor values that Python read in the trace.
    """

    program: ExportedProgram
    output_spec: pytree.TreeSpec
    bounds: tuple[tuple[DimensionBound, ...], ...]
    dynamic: str
    reads: int = 0


#: Which dimensions to keep symbolic: all, the first one of each tensor, or none.
DYNAMIC_CHOICES = ("all", "first", "none")


#: The choices to try with the values of the example if no choice exports without them.
ASSUMED_CHOICES = ("all", "first")


def export_call(
    module: nn.Module,
    call: ModuleCall,
    choices: Sequence[str] = DYNAMIC_CHOICES,
    *,
    assume: bool = False,
    batch: Sequence[Collection[int]] | None = None,
) -> ExportedCall:
    """Export ``module`` for ``call`` in its present training mode, with as many symbolic dimensions as possible.

    Args:
        module: the module.
        call: its arguments.
        choices: of :data:`DYNAMIC_CHOICES`, tried in order until one exports.
        assume: if none exports, decide conditions on values as in the example, and assert them in the graph.
        batch: for each tensor, the dimensions that ``"first"`` keeps symbolic; by default the first one.

    Raises:
        CaptureError: the module does not export as one graph, or does not run on this call at all.
    """
    failures: list[str] = []
    found = _export_first(module, call, choices, failures, batch)
    reason = (
        failures[0] + (f" (with fixed shapes: {failures[-1]})" if failures[-1] != failures[0] else "")
        if failures
        else ""
    )
    if found is None and assume and any(_may_export_with_values(failure) for failure in failures):
        failures = []
        with PROCESS_LOCK, values_of_example():
            assumed = [choice for choice in ASSUMED_CHOICES if choice in choices]
            found = _export_first(module, call, assumed, failures, batch)
        reason += f" (with the values of the example: {failures[0]})" if failures else ""
    if found is not None:
        return found
    raise CaptureError(
        f"{module._get_name()} does not capture as one graph: {reason}; "
        "torch.export needs control flow that does not depend on tensor values"
    )


def _may_export_with_values(failure: str) -> bool:
    """Whether a trace with values may succeed: a branch depends on them, or code failed that runs in eager mode."""
    return _DEPENDS_ON_VALUES in failure or failure.startswith(_MODEL_ERRORS)


def _export_first(
    module: nn.Module,
    call: ModuleCall,
    choices: Sequence[str],
    failures: list[str],
    batch: Sequence[Collection[int]] | None,
) -> ExportedCall | None:
    for dynamic in choices:
        wrapper = _FlatCall(module, call)
        try:
            program = _export(wrapper, call, _choose_symbolic(call, dynamic, batch))
        except CaptureError:
            raise
        except Exception as error:  # torch.export passes on any exception of the model's own code
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
    """Capture ``module.forward`` for ``call`` in its present training mode and check the graph against eager.

    Hooks of ``module`` itself are not part of the graph; the caller of the graph must run them. The graph is valid for
    calls that differ from this one only in sizes and values of tensors, as long as everything else that the module's
    Python reads (attributes, modes, globals) is unchanged.

    Raises:
        CaptureError: the module does not capture as one graph, a submodule has hooks that the graph would not run, the
            graph does not read all values that Python reads, or the graph differs from eager.
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
    """Compare also on values other than the example's, if the module accepts them."""
    other = dataclasses.replace(call, tensors=tuple(t.requires_grad_(o.requires_grad) for t, o in _change_all(call)))
    try:
        expected = observe_eager(module, other)
    except Exception as error:  # the module's own code may refuse such values with any exception
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
    """Compare the graph with eager in outputs, buffers and gradients, and return it with the largest difference.

    Args:
        module: the module that the graph was captured from.
        call: the arguments of both runs, which start from the same random state.
        captured: the graph.
        expected: the run in eager mode, if it is known.

    Raises:
        CaptureError: they differ by more than the tolerance, or the module changes state that a graph cannot change.
    """
    expected = observe_eager(module, call) if expected is None else expected
    found = observe_run(module, call, lambda: list(captured.graph_module(*call.tensors)))
    return dataclasses.replace(captured, largest_error=assert_same(type(module).__name__, found, expected))


def _refuse_inner_hooks(module: nn.Module) -> None:
    for name, child in module.named_modules():
        hooks = [hook for kind in HOOK_KINDS for hook in getattr(child, kind, {}).values()]
        unknown = [hook for hook in hooks if not is_known_hook(hook)]
        if child is not module and unknown:
            hook = getattr(unknown[0], "__name__", unknown[0])
            raise CaptureError(
                f"submodule {name} of {type(module).__name__} has a hook ({hook}), which a graph would not run"
            )


class _SeenOutput:
    """Carries results out of the trace, in which plain attributes of modules are restored.

    Attributes:
        spec: the nesting of the result.
        reads: the number of tensor values that Python read.
    """

    spec: pytree.TreeSpec | None = None
    reads: int = 0


class _FlatCall(nn.Module):
    """The module to export: calls a module's ``forward`` with a flat list of tensors and returns a flat tuple."""

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


def _choose_symbolic(call: ModuleCall, dynamic: str, batch: Sequence[Collection[int]] | None) -> list[Collection[int]]:
    """For each tensor, the dimensions to keep symbolic."""
    if dynamic == "first":
        return [(0,)] * len(call.tensors) if batch is None else list(batch)
    return [range(t.dim()) if dynamic == "all" else () for t in call.tensors]


def _export(wrapper: _FlatCall, call: ModuleCall, symbolic: Sequence[Collection[int]]) -> ExportedProgram:
    dims = [
        {i: Dim.AUTO if i in chosen else Dim.STATIC for i in range(t.dim())}
        for t, chosen in zip(call.tensors, symbolic, strict=True)
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(PROCESS_LOCK)
        stack.enter_context(canonical_kernels())
        stack.enter_context(restored_state(wrapper.module))
        stack.enter_context(weights_without_storage(wrapper.module))
        stack.enter_context(without_redundant_moves())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        stack.enter_context(quiet_loggers(*EXPORT_LOGGERS, level=logging.ERROR))
        stack.enter_context(quiet_loggers(FAKE_TENSOR_LOGGER))
        stack.enter_context(torch.enable_grad())
        return torch.export.export(wrapper, (list(call.tensors),), dynamic_shapes=(dims,), strict=False)


def _to_captured_graph(call: ExportedCall) -> CapturedGraph:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = call.program.module()
    assert isinstance(exported, GraphModule)
    guards = take_guards(exported)
    graph = exported.graph
    for node in reversed(list(graph.nodes)):
        if node.target is torch.ops.aten._assert_tensor_metadata.default or (node.op == "get_attr" and not node.users):
            graph.erase_node(node)
    output = graph.output_node()
    output.args = (tuple(pytree.tree_leaves(output.args[0], is_leaf=lambda leaf: leaf is None)),)
    graph.set_codegen(CodeGen())
    graph_module = GraphModule(exported, graph)
    return CapturedGraph(
        graph_module=graph_module,
        output_spec=call.output_spec,
        bounds=call.bounds,
        guards=guards,
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
    # Export assumes that symbolic sizes are at least 2, so sizes 0 and 1 need other graphs.
    least = 2 if limits is None else max(2, int(limits.lower))
    finite = limits is not None and limits.upper.is_finite
    return DimensionBound(symbol=str(expression), least=least, greatest=float(limits.upper) if finite else float("inf"))


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return f"{type(error).__name__}: {text[:400]}"
