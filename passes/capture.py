"""Turn a module call into an fx graph over the module's own weights, and prove it right.

The module is exported with :func:`torch.export.export` behind a wrapper that takes the tensors of
the call as one flat list. The graph that comes back is made of ATen operators, trains, and refers
to the module's own Parameter and buffer objects under ``module.<qualified name>``; nothing is
copied. Dimensions are left symbolic as far as the model allows: all of them, else the first one
of each tensor, else none.

Every capture is run once against the module on the same example under the same random state;
outputs and buffers must agree. What export cannot express it refuses, and so does this function.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.fx.graph import CodeGen
from torch.utils import _pytree as pytree

from passes.base import CaptureError
from passes.calls import ModuleCall, flatten_result

logger = logging.getLogger(__name__)

#: Where the captured module's parameters and buffers stand in a captured graph.
MODULE_PREFIX = "module."

#: Largest accepted departure of a captured graph from eager: (relative, absolute) by dtype.
TOLERANCES: dict[torch.dtype, tuple[float, float]] = {
    torch.float64: (1e-9, 1e-10),
    torch.complex128: (1e-9, 1e-10),
    torch.float32: (1e-4, 1e-5),
    torch.complex64: (1e-4, 1e-5),
    torch.float16: (1e-2, 1e-3),
    torch.bfloat16: (2e-2, 1e-2),
}


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
        """Whether the graph is right for tensors of these shapes. Sizes 0 and 1 are never generalised to."""
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
    """

    program: ExportedProgram
    output_spec: pytree.TreeSpec
    bounds: tuple[tuple[DimensionBound, ...], ...]
    dynamic: str


def export_call(module: nn.Module, call: ModuleCall) -> ExportedCall:
    """Export ``module`` for ``call`` in its present training mode, with as many symbolic dimensions as work.

    Raises:
        CaptureError: the module does not export as one graph, or does not run on this call at all.
    """
    failures: list[str] = []
    for dynamic in ("all", "first", "none"):
        wrapper = _FlatCall(module, call)
        try:
            program = _export(wrapper, call, dynamic)
        except CaptureError:
            raise
        except Exception as error:  # torch.export raises whatever the model's own code raises
            failures.append(_first_lines(error))
            logger.debug("capture with %s dimensions dynamic failed: %s", dynamic, error)
            continue
        assert wrapper.seen.spec is not None
        placeholders = {node.name: node for node in program.graph.find_nodes(op="placeholder")}
        inputs = [placeholders[name] for name in program.graph_signature.user_inputs]
        bounds = tuple(_bounds(node.meta["val"], program.range_constraints) for node in inputs)
        return ExportedCall(program=program, output_spec=wrapper.seen.spec, bounds=bounds, dynamic=dynamic)
    _observe(module, lambda: _run_eagerly(module, call))
    raise CaptureError(
        f"{module._get_name()} does not capture as one graph: {failures[0]}"
        + (f" (with fixed shapes: {failures[-1]})" if failures[-1] != failures[0] else "")
        + "; torch.export needs control flow that does not depend on tensor values"
    )


def capture_call(module: nn.Module, call: ModuleCall) -> CapturedGraph:
    """Capture ``module`` for ``call`` in its present training mode and check the result against eager.

    Raises:
        CaptureError: the module does not capture as one graph, or the graph departs from eager.
    """
    captured = _to_captured_graph(export_call(module, call))
    error_seen = _compare_with_eager(module, call, captured)
    return dataclasses.replace(captured, largest_error=error_seen)


class _SeenOutput:
    """Carries the nesting of the result out of the trace, where plain attributes are put back."""

    spec: pytree.TreeSpec | None = None


class _FlatCall(nn.Module):
    """Calls a module with a flat list of tensors and returns a flat tuple; what export sees."""

    def __init__(self, module: nn.Module, call: ModuleCall) -> None:
        super().__init__()
        self.module = module
        self.training = module.training
        self.call = call
        self.seen = _SeenOutput()

    def forward(self, tensors: list[torch.Tensor]) -> tuple[Any, ...]:
        args, kwargs = self.call.rebuild(tensors)
        leaves, self.seen.spec = flatten_result(self.module(*args, **kwargs))
        return tuple(leaves)


def _export(wrapper: _FlatCall, call: ModuleCall, dynamic: str) -> ExportedProgram:
    dims = [
        {i: Dim.AUTO if dynamic == "all" or (dynamic == "first" and i == 0) else Dim.STATIC for i in range(t.dim())}
        for t in call.tensors
    ]
    with canonical_kernels(), _restored_state(wrapper.module), warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        return torch.export.export(wrapper, (list(call.tensors),), dynamic_shapes=(dims,), strict=False)


@contextlib.contextmanager
def canonical_kernels() -> Iterator[None]:
    """Switch off what makes a module compute by other kernels than its own code says.

    The fused inference path of ``nn.TransformerEncoder`` gives other numbers under a padding mask,
    and an ambient autocast region would be frozen into the graph instead of surrounding it.
    """
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with contextlib.ExitStack() as stack:
            for device_type in _autocast_devices():
                stack.enter_context(torch.autocast(device_type, enabled=False))
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _autocast_devices() -> list[str]:
    return [name for name in ("cpu", "cuda", "xpu", "mps") if torch.is_autocast_enabled(name)]


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


@contextlib.contextmanager
def _restored_state(module: nn.Module) -> Iterator[None]:
    """Undo what running a module leaves behind: random states and buffers."""
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(devices=[device.index for device in devices]):
            yield
    finally:
        with torch.no_grad():
            for buffer, saved in buffers:
                if not buffer.is_meta:
                    buffer.copy_(saved)


def _compare_with_eager(module: nn.Module, call: ModuleCall, captured: CapturedGraph) -> float:
    """Largest departure in outputs and buffers of graph against eager; raises beyond the tolerance."""
    expected = _observe(module, lambda: _run_eagerly(module, call))
    found = _observe(module, lambda: list(captured.graph_module(*call.tensors)))
    largest = 0.0
    for name, want in expected.items():
        largest = max(largest, _departure(type(module).__name__, name, found[name], want))
    return largest


def _run_eagerly(module: nn.Module, call: ModuleCall) -> list[Any]:
    """The leaves of what the module itself returns.

    Raises:
        CaptureError: the module's own code refuses the call.
    """
    args, kwargs = call.rebuild(call.tensors)
    try:
        result = module(*args, **kwargs)
    except Exception as error:  # the model's own code raises what it likes
        given = [f"{name}: {t.dtype} {tuple(t.shape)}" for name, t in zip(call.names, call.tensors, strict=True)]
        raise CaptureError(
            f"{module._get_name()} itself refuses the call with {', '.join(given) or 'no tensors'}: "
            f"{_first_lines(error)}; expected arguments that the model runs on; try them on the model without adapters"
        ) from error
    return flatten_result(result)[0]


def _observe(module: nn.Module, run: Callable[[], list[Any]]) -> dict[str, Any]:
    """Outputs of ``run`` and the buffers after it, by name; everything is put back."""
    with canonical_kernels(), _restored_state(module), torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen: dict[str, Any] = {f"output {i}": _detached(leaf) for i, leaf in enumerate(run())}
        seen |= {f"buffer {name}": buffer.detach().clone() for name, buffer in module.named_buffers()}
    return seen


def _detached(leaf: Any) -> Any:
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def _departure(owner: str, name: str, found: Any, want: Any) -> float:
    if not isinstance(want, torch.Tensor):
        if found != want:
            raise CaptureError(f"{owner}: {name} of the captured graph is {found!r}, eager gives {want!r}")
        return 0.0
    if want.is_meta:
        return 0.0
    rtol, atol = TOLERANCES.get(want.dtype, (0.0, 0.0))
    same_kind = found.shape == want.shape and found.dtype == want.dtype
    if same_kind and torch.allclose(found, want, rtol=rtol, atol=atol, equal_nan=True):
        difference = (found - want).abs().nan_to_num() if want.dtype.is_floating_point else None
        return float(difference.max()) if difference is not None and difference.numel() else 0.0
    detail = f"by up to {float((found - want).abs().max()):.3g}" if same_kind and want.numel() else ""
    raise CaptureError(
        f"{owner}: {name} of the captured graph ({found.dtype}, {tuple(found.shape)}) departs from eager "
        f"({want.dtype}, {tuple(want.shape)}) {detail} beyond rtol {rtol:g}, atol {atol:g} under the same random state"
    )


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    return f"{type(error).__name__}: {text[:400]}"
