"""Graphs of modules whose Python asks for values of tensors, under the assumption that answers stay as they were.

``if mask.any():`` or ``if labels.max() >= size: raise`` cannot be decided without values. Such a module is traced
with the values of its example; every answer becomes an assertion in the graph. A call whose values answer
otherwise stops there, everything that it did is undone, and the module's own Python runs instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
from collections.abc import Iterator
from pathlib import PurePath

import torch
import torch._functorch.config
from torch import nn
from torch._subclasses import meta_utils
from torch.fx import GraphModule, Node

from passes.base import CaptureError, find_graph_modules
from passes.calls import ModuleCall
from passes.module_state import canonical_kernels, restored_state
from passes.quiet import quiet_loggers

logger = logging.getLogger(__name__)

_ASSERT = torch.ops.aten._assert_scalar.default
#: How ``aten._assert_scalar`` begins what it says.
_FAILED = "Runtime assertion failed"
#: What the floating point inputs are multiplied by in trials of an assumption; random numbers are others each time.
_TRIALS = (0.5, 1.0, 1.0, 1.0)


class AssumptionError(Exception):
    """The values of a call are not as a graph assumes; nothing that it did is left."""


@dataclasses.dataclass(kw_only=True)
class TrackRecord:
    """How often a graph was called and how often its assumptions did not hold."""

    calls: int = 0
    departures: int = 0

    @property
    def is_poor(self) -> bool:
        """Whether the graph costs more than it saves: it has failed some times, and one time in four."""
        return self.departures >= 4 and 4 * self.departures >= self.calls


@contextlib.contextmanager
def values_of_example() -> Iterator[None]:
    """Inside, a trace decides what depends on values by those of the example, and asserts them in the graph."""
    with (
        torch._functorch.config.patch(
            fake_tensor_propagate_real_tensors=True, generate_fake_kernels_from_real_mismatches=True
        ),
        _values_of_parameters(),
        _as_in_eager_code(),
        # They warn of every decision, which is what is wanted here.
        quiet_loggers("torch.fx.experimental.symbolic_shapes", "torch._subclasses"),
    ):
        yield


@contextlib.contextmanager
def _values_of_parameters() -> Iterator[None]:
    """Inside, a trace with values has those of Parameters too.

    PyTorch (2.13) copies the values of plain tensors only; where a Parameter's should be, it leaves whatever the
    memory held, and a branch is decided by chance.
    """
    name = "_safe_copy"
    original = getattr(meta_utils, name, None)
    if original is None:
        yield
        return

    def copy(target: torch.Tensor, source: torch.Tensor | None) -> None:
        original(target, source.detach() if isinstance(source, nn.Parameter) else source)

    setattr(meta_utils, name, copy)
    try:
        yield
    finally:
        setattr(meta_utils, name, original)


@contextlib.contextmanager
def _as_in_eager_code() -> Iterator[None]:
    """Inside, only PyTorch itself is told that a module is being exported.

    Models that ask take another path then, to avoid branches on values. Here these are no obstacle, and the other
    path may be one that was never run: several models of transformers fail on it.
    """
    original = torch.compiler.is_exporting

    def is_exporting() -> bool:
        asks = str(sys._getframe(1).f_globals.get("__name__", ""))
        return original() and asks.partition(".")[0] == "torch"

    torch.compiler.is_exporting = is_exporting
    try:
        yield
    finally:
        torch.compiler.is_exporting = original


def find_assumptions(graph_module: GraphModule) -> tuple[str, ...]:
    """The lines of the model whose questions for values a graph answers as in the example; each once."""
    nodes = [node for body in find_graph_modules(graph_module) for node in body.graph.nodes if node.target is _ASSERT]
    return tuple(dict.fromkeys(_name_line(node) for node in nodes))


def _name_line(node: Node) -> str:
    """``model.py:12: if mask.any():`` by the node's own record, or what the assertion says."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    places = [i for i, line in enumerate(lines) if line.startswith('File "')]
    if not places:
        return str(node.args[1] if len(node.args) > 1 else node)
    path, number, *_ = lines[places[-1]].removeprefix('File "').replace('", line ', ", ").split(", ")
    return ": ".join([f"{PurePath(path).name}:{number}", *lines[places[-1] + 1 : places[-1] + 2]])


@contextlib.contextmanager
def undone_on_departure(module: nn.Module) -> Iterator[None]:
    """Put buffers and random states back when an assumption fails inside.

    Raises:
        AssumptionError: in place of the assertion's own error.
    """
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {t.device for t in (*module.parameters(), *module.buffers()) if t.device.type == "cuda"}
    on_devices = [(device, torch.cuda.get_rng_state(device)) for device in devices]
    on_cpu = torch.get_rng_state()
    try:
        yield
    except RuntimeError as error:
        if _FAILED not in str(error):
            raise
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)
        torch.set_rng_state(on_cpu)
        for device, state in on_devices:
            torch.cuda.set_rng_state(state, device)
        raise AssumptionError(str(error)) from error


def assert_steady(module: nn.Module, call: ModuleCall, graph_module: GraphModule) -> None:
    """Try what a graph assumes on other values: inputs made smaller, other random numbers.

    Raises:
        CaptureError: it does not hold there, so that it would not often hold; or the graph writes into its
            inputs, which could not be undone.
    """
    name = type(module).__name__
    with canonical_kernels(), restored_state(module), torch.no_grad():
        for scale in _TRIALS:
            tensors = [t.detach() * scale if t.is_floating_point() else t.detach().clone() for t in call.tensors]
            torch.rand(())
            with contextlib.suppress(IndexError):  # the module's own code would not take such values either
                _try(name, graph_module, tensors)
            if any(tensor._version for tensor in tensors):
                raise CaptureError(f"{name} depends on values and writes into its arguments")


def _try(name: str, graph_module: GraphModule, tensors: list[torch.Tensor]) -> None:
    try:
        graph_module(*tensors)
    except RuntimeError as error:
        if _FAILED in str(error):
            reason = " ".join(str(error).split())[:200]
            raise CaptureError(
                f"{name} does not capture as one graph: branches depend on tensor values, and what those of the "
                f"example decide does not hold for others ({reason})"
            ) from error
        logger.debug("a trial of an assumption says nothing: %s", error)
