"""Translate an exported program to an ONNX model whose parameters keep their names and their layout.

The exporter's own optimization folds transposes and slices of weights into new initializers without names. Here every
parameter stays whole, under its state-dict key and separate from others with equal values, so that adapters can be
folded into the file later and fed to it at run time. onnxruntime makes the same optimization when it loads the file.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Collection, Iterator, Sequence

import onnx_ir
import torch
from onnx_ir.passes import common
from onnxscript import optimizer
from torch import nn
from torch.export import ExportedProgram
from torch.onnx import ONNXProgram

from adapter_compiler.errors import ExportError
from passes.capture.capture import MODULE_PREFIX
from passes.capture.quiet import quiet_loggers
from passes.compat import ONNX_LOGGER, onnx_decompositions, without_onnx_log
from passes.export.decompose_exports import find_rules
from passes.export.fold_constant_sizes import FoldConstantSizesPass
from passes.export.lift_attention import LiftAttentionPass
from passes.export.zero_masked_rows import ZeroMaskedRowsPass

_FOLDING_ROUNDS = 2


def translate_program(
    program: ExportedProgram, inputs: Sequence[str], outputs: Sequence[str], *, opset: int | None
) -> ONNXProgram:
    """The optimized ONNX program for ``program``, with named inputs and outputs.

    Raises:
        ExportError: an operator has no translation.
    """
    FoldConstantSizesPass()(program.graph_module)
    LiftAttentionPass()(program.graph_module)
    ZeroMaskedRowsPass()(program.graph_module)
    with quiet_exporter(), torch.enable_grad(), onnx_decompositions(find_rules(program)):
        try:
            translated = torch.onnx.export(
                program,
                dynamo=True,
                verbose=False,
                optimize=False,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
            )
        except Exception as error:  # the exporter raises many types
            raise ExportError(f"torch.onnx has no translation for this model: {innermost(error)}") from error
        assert translated is not None
        try:
            clean_up(translated.model, find_kept_weights(program))
        except Exception as error:  # so does the optimizer, for example where it folds constants
            raise ExportError(f"onnxscript cannot optimize the translated model: {innermost(error)}") from error
    return translated


def clean_up(model: onnx_ir.Model, parameters: Collection[str]) -> None:
    """Fold constants, except operations on parameters; then give parameters the user's names."""
    kept = set(parameters)

    def may_fold(node: onnx_ir.Node) -> bool | None:
        return False if any(value is not None and value.name in kept for value in node.inputs) else None

    common.InlinePass()(model)
    for _ in range(_FOLDING_ROUNDS):
        optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=may_fold)
    for one in (
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        common.RemoveUnusedOpsetsPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ):
        one(model)
    restore_weight_names(model)


def find_kept_weights(source: ExportedProgram | nn.Module) -> list[str]:
    """The names of parameters, and of buffers that training may change, such as running statistics."""
    named = (*source.named_parameters(), *source.named_buffers())
    return [name for name, tensor in named if tensor.is_floating_point() or isinstance(tensor, torch.nn.Parameter)]


def restore_weight_names(model: onnx_ir.Model) -> None:
    """Give initializers the user's state-dict keys, without the names of the wrappers around the module.

    A weight with the name of an input or another value gets an underscore: names are unique in a file.
    """
    values = (value for node in model.graph.all_nodes() for value in node.outputs)
    taken = {value.name for value in (*model.graph.inputs, *model.graph.initializers.values(), *values)}
    for name, value in list(model.graph.initializers.items()):
        wanted = name.removeprefix(MODULE_PREFIX).removeprefix(MODULE_PREFIX)
        if wanted != name:
            value.name = next(spelling for spelling in spellings(wanted) if spelling not in taken)
            taken.add(value.name)


def spellings(name: str) -> Iterator[str]:
    """The names that a weight may have: its own, or with underscores if another value has that name."""
    return (name + "_" * count for count in itertools.count())


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """A context without the warnings of exporters: a missing torchvision, their own deprecations, failed graphs."""
    with (
        quiet_loggers(ONNX_LOGGER, level=logging.ERROR),
        warnings.catch_warnings(),
        without_onnx_log(),
    ):
        warnings.simplefilter("ignore")
        yield


def innermost(error: BaseException) -> str:
    """The last cause of a chain of exceptions, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
