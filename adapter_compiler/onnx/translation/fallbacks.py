"""The strategies: ways to export a model as an ONNX file, tried in order until one is verified.

From the most to the least preferred:

    torch.export      all dimensions open, then those that are not one in the example, then the batch, then none
    captured graph    the same for ``forward`` alone, as compiling captures it, without hooks of the model itself
    recorded call     the same for the operators that one call runs, for what torch.export refuses for other reasons
    TorchScript       the same; branches and loops become constants, so verification decides
    assumed values    torch.export once more, with branches on values decided as in the example

Inputs and outputs are always flat, with names from the model's signature; this is enough to export models that
return caches or take dicts. The captured graph can help only where a call runs more than ``forward``: what
torch.export refuses inside ``forward`` cannot be captured as one graph either.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import torch
from torch import nn
from torch.export import ExportedProgram

from adapter_compiler.errors import CaptureError, ExportError
from adapter_compiler.onnx.translation.captured import capture_forward
from adapter_compiler.onnx.translation.exportable import NamedOutputs
from adapter_compiler.onnx.translation.opsets import assert_opset
from adapter_compiler.onnx.translation.torchscript import guess_bounds, trace_to_file
from adapter_compiler.onnx.translation.translate import translate_program
from adapter_compiler.onnx.translation.varying_sizes import Group, VaryingSizes
from adapter_compiler.onnx.verification.sizes import Bounds
from passes.capture.assumptions import find_assumptions
from passes.capture.calls import ModuleCall, split_call
from passes.capture.capture import ExportedCall, export_call
from passes.capture.module_state import runs_more_than_forward
from passes.capture.recording import record_call

_BRANCHES = (torch.ops.higher_order.cond, torch.ops.higher_order.while_loop)

_OPENNESS = {
    "all": "all dimensions open",
    "larger": "dimensions above one open",
    "first": "batch open",
    "none": "fixed shapes",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Strategy:
    """One way to export.

    Attributes:
        exporter: ``"torch.export"``, ``"captured graph"``, ``"recorded call"``, ``"TorchScript"`` or
            ``"assumed values"``.
        dynamic: the dimensions to leave open: ``"all"``; ``"larger"``: those that are not one in the example, and the
            batch; ``"first"``: the batch; or ``"none"``.
    """

    exporter: str
    dynamic: str

    @property
    def name(self) -> str:
        """As reports show it."""
        return f"{self.exporter}, {_OPENNESS[self.dynamic]}"


def find_strategies(module: nn.Module) -> tuple[Strategy, ...]:
    """The strategies for a model; the captured graph is tried only where a call runs more than ``forward``."""
    captured = ("captured graph",) if runs_more_than_forward(module) else ()
    exporters = ("torch.export", *captured, "recorded call", "TorchScript")
    pairs = [(exporter, dynamic) for exporter in exporters for dynamic in _OPENNESS]
    pairs += [("assumed values", dynamic) for dynamic in _OPENNESS if dynamic != "none"]
    return tuple(Strategy(exporter=exporter, dynamic=dynamic) for exporter, dynamic in pairs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrittenDraft:
    """The file that a strategy wrote, not yet verified.

    Attributes:
        opset: the operator set.
        bounds: for each input tensor, for each dimension, the sizes that the file should be valid for.
        frozen: values that became constants, according to the exporter's warnings.
        program: the program that the file was translated from, if its nodes correspond to the file's.
    """

    opset: int
    bounds: Bounds
    frozen: tuple[str, ...] = ()
    program: ExportedProgram | None = None

    @property
    def is_open(self) -> bool:
        """Whether any dimension of any input is open."""
        return any(bound.symbol is not None for bounds in self.bounds for bound in bounds)

    @property
    def has_branches(self) -> bool:
        """Whether the model itself uses ``torch.cond`` or ``torch.while_loop``, so that values choose what runs."""
        return self.program is not None and any(node.target in _BRANCHES for node in self.program.graph.nodes)


#: Bytes of a file's name that torch can add what it adds for the weights to.
_LONGEST_NAME = 200


def write_draft(
    strategy: Strategy,
    exporter: NamedOutputs,
    call: ModuleCall,
    draft: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    *,
    opset: int | None,
    sizes: VaryingSizes | None = None,
) -> WrittenDraft:
    """Write ``draft`` by one strategy.

    Args:
        strategy: how.
        exporter: the model.
        call: the example.
        draft: the file to write.
        inputs: names for its inputs.
        outputs: names for its outputs.
        opset: the operator set; by default the exporter's.
        sizes: which dimensions of the example vary, if they have been looked for.

    Raises:
        ExportError: the strategy does not work for this model, or not with this opset.
    """
    sizes = find_varying_sizes(exporter, call) if sizes is None else sizes
    if strategy.exporter == "TorchScript":
        enlarged = next(_enlarge(sizes, strategy.dynamic))
        bounds = guess_bounds(enlarged, _choose_groups(sizes, strategy.dynamic))
        frozen = trace_to_file(exporter, enlarged, draft, inputs, outputs, bounds, opset=opset)
        written = WrittenDraft(opset=assert_opset(draft, opset), bounds=bounds, frozen=frozen)
    else:
        written = _translate(strategy, exporter, sizes, draft, inputs, outputs, opset)
    try:
        onnx.checker.check_model(str(draft))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported file: {error}") from error
    return written


def find_varying_sizes(exporter: NamedOutputs, call: ModuleCall) -> VaryingSizes:
    """Which dimensions of a call vary; the model is run when that is first asked."""
    return VaryingSizes(lambda other: [tensor for _, tensor in exporter.named_outputs(other)], call)


def is_redundant(strategy: Strategy, sizes: VaryingSizes) -> bool:
    """Whether a strategy leaves the same dimensions open as the one before it."""
    return strategy.dynamic == "larger" and not sizes.has_other_ones


def _enlarge(sizes: VaryingSizes, dynamic: str) -> Iterator[ModuleCall]:
    """The example with two or more instead of one where a dimension is to be open, because exporters fix a one.

    The first is to be preferred; the others have fewer such dimensions.
    """
    if dynamic == "all":
        yield sizes.enlarge(sizes.of_one)
    if dynamic != "none":
        yield sizes.enlarge([sizes.batch])
    yield sizes.call


def _choose_groups(sizes: VaryingSizes, dynamic: str) -> list[Group]:
    """What a trace leaves open: the batch and, unless it is to be that alone, lengths of tokens, flags and outputs."""
    if dynamic == "none":
        return []
    if dynamic == "first":
        return [sizes.batch]
    tensors = sizes.call.tensors
    others = [group for group in sizes.groups if any(not tensors[place.tensor].is_floating_point() for place in group)]
    others += [group for group, is_visible in sizes.groups.items() if is_visible and dynamic == "all"]
    return list(dict.fromkeys([sizes.batch, *others]))


def _translate(
    strategy: Strategy,
    exporter: NamedOutputs,
    sizes: VaryingSizes,
    draft: Path,
    inputs: Sequence[str],
    outputs: Sequence[str],
    opset: int | None,
) -> WrittenDraft:
    """Export on the enlarged example, or on one with fewer sizes changed where the exporter fixes or refuses those."""
    failure: ExportError | CaptureError | None = None
    tried: list[ModuleCall] = []
    for candidate in _enlarge(sizes, strategy.dynamic):
        if any(_has_same_sizes(candidate, other) for other in tried):
            continue
        tried.append(candidate)
        try:
            exported = _export(strategy, exporter, candidate, sizes)
        except CaptureError as error:
            failure = failure or error
            continue
        if not _allows(exported.bounds, sizes.call):
            failure = failure or ExportError("sizes that are one in the example are fixed to another size")
            continue
        translated = translate_program(exported.program, inputs, outputs, opset=opset)
        # Weights are beside the file while it is worked on, under a longer name, if that is possible.
        translated.save(draft, external_data=len(os.fsencode(draft.name)) <= _LONGEST_NAME or None)
        written = assert_opset(draft, opset)
        frozen = find_assumptions(exported.program.graph_module) if strategy.exporter == "assumed values" else ()
        return WrittenDraft(opset=written, bounds=exported.bounds, frozen=frozen, program=translated.exported_program)
    raise ExportError(f"not exported: {failure}") from failure


def _has_same_sizes(one: ModuleCall, other: ModuleCall) -> bool:
    return all(a.shape == b.shape for a, b in zip(one.tensors, other.tensors, strict=True))


def _allows(bounds: Bounds, call: ModuleCall) -> bool:
    """Whether each size of a call is open or the one that is fixed."""
    return all(
        bound.symbol is not None or bound.least == size
        for tensor, dimensions in zip(call.tensors, bounds, strict=True)
        for size, bound in zip(tensor.shape, dimensions, strict=True)
    )


def _export(strategy: Strategy, exporter: NamedOutputs, call: ModuleCall, sizes: VaryingSizes) -> ExportedCall:
    dynamic, batch = strategy.dynamic, None
    if dynamic == "larger":
        dynamic = "all"
    elif dynamic == "first":
        batch = [[p.dimension for p in sizes.batch if p.tensor == i] for i in range(len(call.tensors))]
    if strategy.exporter in ("torch.export", "assumed values"):
        assume = strategy.exporter == "assumed values"
        return export_call(exporter, call, (dynamic,), assume=assume, batch=batch)
    is_recorded = strategy.exporter == "recorded call"
    graph_module = record_call(exporter, call) if is_recorded else capture_forward(exporter.module, call)
    return export_call(graph_module, split_call(call.tensors, {}), (dynamic,), batch=batch)
