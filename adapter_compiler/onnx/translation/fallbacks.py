"""The strategies: one way to an ONNX file after another, until one is verified.

From best to last resort:

    torch.export      all dimensions open, then the first one of each tensor, then none
    captured graph    the same for ``forward`` alone, as compiling captures it, without hooks of the model itself
    recorded call     the same for the operators that one call runs, for what torch.export refuses for other reasons
    TorchScript       the same; freezes branches and loops, so verification decides
    assumed values    torch.export once more, with branches on values frozen as in the example

Inputs and outputs are always flat, with names from the model's signature, which alone rescues models that
return caches or take dicts. The captured graph can help only where a call runs more than ``forward``: what
torch.export refuses inside ``forward`` has no graph of the whole, and runs as Python around smaller graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import onnx
from torch import nn
from torch.export import ExportedProgram

from adapter_compiler.errors import CaptureError, ExportError
from adapter_compiler.onnx.translation.captured import capture_forward
from adapter_compiler.onnx.translation.exportable import NamedOutputs
from adapter_compiler.onnx.translation.opsets import assert_opset
from adapter_compiler.onnx.translation.torchscript import guess_bounds, trace_to_file
from adapter_compiler.onnx.translation.translate import translate_program
from adapter_compiler.onnx.verification.inputs import double_batch_of_one
from passes.capture.assumptions import find_assumptions
from passes.capture.calls import ModuleCall, split_call
from passes.capture.capture import ASSUMED_CHOICES, DYNAMIC_CHOICES, DimensionBound, ExportedCall, export_call
from passes.capture.module_state import runs_more_than_forward
from passes.capture.recording import record_call

_OPENNESS = {"all": "all dimensions open", "first": "batch open", "none": "fixed shapes"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """One rung of the strategies.

    Attributes:
        exporter: ``"torch.export"``, ``"captured graph"``, ``"recorded call"``, ``"TorchScript"`` or
            ``"assumed values"``.
        dynamic: ``"all"``, ``"first"`` or ``"none"``: the dimensions to leave open.
    """

    exporter: str
    dynamic: str

    @property
    def name(self) -> str:
        """As reports show it."""
        return f"{self.exporter}, {_OPENNESS[self.dynamic]}"


def find_strategies(module: nn.Module) -> tuple[Strategy, ...]:
    """The rungs for a model; the captured graph is one only where ``forward`` is not all that a call runs."""
    captured = ("captured graph",) if runs_more_than_forward(module) else ()
    exporters = ("torch.export", *captured, "recorded call", "TorchScript")
    rungs = [(exporter, dynamic) for exporter in exporters for dynamic in DYNAMIC_CHOICES]
    rungs += [("assumed values", dynamic) for dynamic in ASSUMED_CHOICES]
    return tuple(Strategy(exporter=exporter, dynamic=dynamic) for exporter, dynamic in rungs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenDraft:
    """What a strategy wrote, not yet verified.

    Attributes:
        opset: the operator set.
        bounds: per input tensor, per dimension, what sizes the file should be right for.
        frozen: values that became constants, by the exporter's own warnings.
        program: what the file was translated from, if that is known node by node.
    """

    opset: int
    bounds: Sequence[Sequence[DimensionBound]]
    frozen: tuple[str, ...] = ()
    program: ExportedProgram | None = None


def write_draft(
    strategy: Strategy,
    exporter: NamedOutputs,
    call: ModuleCall,
    draft: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int | None,
) -> WrittenDraft:
    """Write ``draft`` by one strategy.

    Raises:
        ExportError: the strategy does not work for this model, or not with this opset.
    """
    if strategy.exporter == "TorchScript":
        doubled = double_batch_of_one(call) or call
        bounds = guess_bounds(doubled, strategy.dynamic)
        frozen = trace_to_file(exporter, doubled, draft, inputs, outputs, bounds, opset=opset)
        written = WrittenDraft(opset=assert_opset(draft, opset), bounds=bounds, frozen=frozen)
    else:
        written = _translate(strategy, exporter, call, draft, inputs, outputs, opset)
    try:
        onnx.checker.check_model(str(draft))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported file: {error}") from error
    return written


def _translate(
    strategy: Strategy,
    exporter: NamedOutputs,
    call: ModuleCall,
    draft: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int | None,
) -> WrittenDraft:
    """Export on two rows instead of one where the example has one, so that the batch stays open."""
    doubled = double_batch_of_one(call) if strategy.dynamic != "none" else None
    failure: CaptureError | None = None
    for candidate in (doubled, call):
        if candidate is None:
            continue
        try:
            exported = _export(strategy, exporter, candidate)
        except CaptureError as error:
            failure = failure or error
            continue
        translated = translate_program(exported.program, inputs, outputs, opset=opset)
        translated.save(draft)
        written = assert_opset(draft, opset)
        frozen = find_assumptions(exported.program.graph_module) if strategy.exporter == "assumed values" else ()
        return WrittenDraft(opset=written, bounds=exported.bounds, frozen=frozen, program=translated.exported_program)
    raise ExportError(f"not exported: {failure}") from failure


def _export(strategy: Strategy, exporter: NamedOutputs, call: ModuleCall) -> ExportedCall:
    if strategy.exporter in ("torch.export", "assumed values"):
        return export_call(exporter, call, (strategy.dynamic,), assume=strategy.exporter == "assumed values")
    is_recorded = strategy.exporter == "recorded call"
    graph_module = record_call(exporter, call) if is_recorded else capture_forward(exporter.module, call)
    return export_call(graph_module, split_call(call.tensors, {}), (strategy.dynamic,))
