"""fold → torch.export → ONNX → onnx.checker → onnxruntime against PyTorch, or no file at all."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import torch
from torch import nn

from adapter_compiler.adapted import AdaptedModel
from adapter_compiler.errors import CaptureError, ConfigError, ExportError
from adapter_compiler.files import written_beside
from adapter_compiler.onnx.inputs import (
    bind_to_names,
    double_batch_of_one,
    find_open_dimensions,
    name_leaves,
    resize_call,
    spell_names,
)
from adapter_compiler.onnx.verify import ExportReport, OutputError, compare_outputs, open_session
from adapter_compiler.ownership import copy_module, share_parameter
from passes.calls import ModuleCall
from passes.capture import MODULE_PREFIX, ExportedCall, canonical_kernels, export_call

logger = logging.getLogger(__name__)


def export_onnx(
    adapted_or_model: nn.Module,
    path: str | Path,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    opset: int | None = None,
) -> ExportReport:
    """Export a model in eval mode to ONNX and verify the file.

    Adapters are folded first. Inputs are named after ``forward``'s arguments, outputs after the keys
    of what it returns. Dimensions are left open as far as the model allows. The file is compared
    with PyTorch on the example, on another batch size, and at another size of every other open
    dimension; it is written beside ``path`` and renamed only when all checks pass.

    Args:
        adapted_or_model: an adapted model, or any module; it is not changed.
        path: the file to write.
        example_args: positional arguments of one call.
        example_kwargs: keyword arguments of one call.
        opset: the ONNX operator set; by default the exporter's.

    Returns:
        A report with ``path``, ``max_abs_error`` and the error of each output on each input.

    Raises:
        ExportError: the model does not export; no file is left.
        VerificationError: the file does not load or departs from PyTorch; no file is left.
    """
    if isinstance(example_args, torch.Tensor):
        raise ConfigError("example_args is a Tensor, expected a tuple of arguments, as in (x,)")
    if not example_args and not example_kwargs:
        raise ConfigError(
            "example_args and example_kwargs are empty, expected the arguments of one call of the model; "
            "give example_args or example_kwargs"
        )
    model = _prepare(adapted_or_model)
    args, kwargs = _to_cpu(example_args), _to_cpu(dict(example_kwargs or {}))
    call = bind_to_names(model, args, kwargs)
    exporter = _NamedOutputs(model)
    with canonical_kernels(), torch.no_grad():
        exported = _export(exporter, call)
        inputs = spell_names(call.names)
        outputs = [name for name, _ in exporter.named_outputs(call)]
        with written_beside(path) as draft:
            used_opset = _write(exported, draft, inputs, outputs, opset)
            errors, refused = _verify(draft, exporter, call, exported, inputs)
    return ExportReport(
        path=Path(path),
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        dynamic=exported.dynamic,
        dynamic_axes={
            name: tuple(i for i, bound in enumerate(bounds) if bound.symbol is not None)
            for name, bounds in zip(inputs, exported.bounds, strict=True)
        },
        opset=used_opset,
        errors=tuple(errors),
        not_verified=tuple(refused),
        fold=adapted_or_model.fold_report if isinstance(adapted_or_model, AdaptedModel) else None,
    )


class _NamedOutputs(nn.Module):
    """Returns the tensors of a module's result as one flat tuple, each once."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        self.training = module.training

    def _get_name(self) -> str:
        """The module's own name, for messages."""
        return str(self.module._get_name())

    def forward(self, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        return tuple(_distinct_tensors(self.module(*args, **kwargs)).values())

    def named_outputs(self, call: ModuleCall) -> list[tuple[str, torch.Tensor]]:
        args, kwargs = call.rebuild(call.tensors)
        return list(_distinct_tensors(self.module(*args, **kwargs)).items())


def _distinct_tensors(result: Any) -> dict[str, torch.Tensor]:
    seen: dict[int, str] = {}
    tensors: dict[str, torch.Tensor] = {}
    for name, leaf in name_leaves(result):
        if isinstance(leaf, torch.Tensor) and seen.setdefault(id(leaf), name) == name:
            tensors[name] = leaf
    return tensors


def _prepare(model: nn.Module) -> nn.Module:
    """A copy of the model, adapters folded, in eval mode on the CPU.

    It is frozen: with gradients, PyTorch traces attention by another kernel, whose layout the exporter
    cannot always translate.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"export_onnx(adapted_or_model=...) is a {type(model).__name__}, expected an AdaptedModel or a "
            "torch.nn.Module; give the model itself"
        )
    if isinstance(model, AdaptedModel):
        return model.fold().eval().cpu().requires_grad_(False)
    return copy_module(model, lambda _, parameter: share_parameter(parameter)).eval().cpu()


def _to_cpu(tree: Any) -> Any:
    return torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.detach().cpu(), tree)


def _export(exporter: _NamedOutputs, call: ModuleCall) -> ExportedCall:
    """Export on two rows instead of one where the example has one, so that the batch stays open."""
    doubled = double_batch_of_one(call)
    if doubled is not None:
        try:
            return export_call(exporter, doubled)
        except CaptureError as error:
            logger.info("no export with two rows: %s", error)
    try:
        return export_call(exporter, call)
    except CaptureError as error:
        raise ExportError(f"not exported: {error}") from error


def _write(exported: ExportedCall, draft: Path, inputs: list[str], outputs: list[str], opset: int | None) -> int:
    with _quiet_exporter(), torch.enable_grad():
        try:
            program = torch.onnx.export(
                exported.program,
                dynamo=True,
                verbose=False,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
            )
        except Exception as error:  # the exporter raises many types
            raise ExportError(f"torch.onnx has no translation for this model: {_innermost(error)}") from error
        assert program is not None
        _restore_weight_names(program.model)
        program.save(draft)
    try:
        onnx.checker.check_model(str(draft))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"onnx.checker refuses the exported file: {error}") from error
    return int(program.model.opset_imports[""])


def _restore_weight_names(model: onnx_ir.Model) -> None:
    """Initializers get the user's state-dict keys, without the names of the wrappers around the module."""
    for name, value in list(model.graph.initializers.items()):
        wanted = name.removeprefix(MODULE_PREFIX).removeprefix(MODULE_PREFIX)
        if wanted != name and wanted not in model.graph.initializers:
            value.name = wanted


def _verify(
    draft: Path, exporter: _NamedOutputs, call: ModuleCall, exported: ExportedCall, inputs: list[str]
) -> tuple[list[OutputError], list[str]]:
    """Errors on every input that PyTorch accepts, and the inputs that it refuses."""
    session = open_session(draft)
    errors: list[OutputError] = []
    refused: list[str] = []
    for case, other in _find_cases(call, exported):
        try:
            expected = exporter.named_outputs(other)
        except Exception as error:  # the model's own code raises what it likes
            logger.warning("not verified on %s, because the model itself refuses it: %s", case, error)
            refused.append(case)
            continue
        errors += compare_outputs(session, case, dict(zip(inputs, other.tensors, strict=True)), expected)
    return errors, refused


def _find_cases(call: ModuleCall, exported: ExportedCall) -> Iterator[tuple[str, ModuleCall]]:
    yield "example", call
    for dimension, size in find_open_dimensions(call, exported.bounds):
        other = size + 1 if size > 1 else 3
        name = "batch" if dimension == 0 else f"dimension {dimension} of size"
        yield f"{name} {other}", resize_call(call, exported.bounds, dimension, size, other)


@contextlib.contextmanager
def _quiet_exporter() -> Iterator[None]:
    """The exporter logs that torchvision is missing and copies tree specs in a deprecated way; both are its own."""
    registration = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = registration.level
    registration.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        registration.setLevel(level)


def _innermost(error: BaseException) -> str:
    """The last cause of a chain of exceptions, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
