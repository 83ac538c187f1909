"""What an export is given: the model, the example, and how its file is to be."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from adapter_compiler.adapters.parameters.factors import assert_additive
from adapter_compiler.errors import ConfigError, ExportError
from adapter_compiler.model.adapted_model import AdaptedModel
from adapter_compiler.onnx.exporting.runtime_adapters import FurtherCheck
from adapter_compiler.onnx.provenance.write import Provenance
from adapter_compiler.onnx.translation.exportable import NamedOutputs
from adapter_compiler.onnx.translation.fallbacks import find_varying_sizes
from adapter_compiler.onnx.translation.varying_sizes import VaryingSizes
from adapter_compiler.onnx.verification.cases import VerificationCase
from adapter_compiler.onnx.verification.inputs import spell_names
from adapter_compiler.onnx.verification.samples.compare import SampleCheck
from adapter_compiler.onnx.verification.verify import assert_comparable
from passes.capture.calls import ModuleCall, describe_refusal
from passes.capture.module_state import canonical_kernels


@dataclasses.dataclass(frozen=True, kw_only=True)
class FileContract:
    """What a file for a certain run time must have, in place of what is found by trying.

    Attributes:
        cases: the inputs that the file is verified on, the example first.
        dimensions: by input and output, the names of dimensions that must be open; ``None`` for fixed ones.
        check: a further check of the file against the model.
    """

    cases: Sequence[VerificationCase]
    dimensions: Mapping[str, Sequence[str | None]]
    check: FurtherCheck


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportTask:
    """What is exported, and how its file is to be.

    Attributes:
        model: what the user gave.
        exporter: the copy of it that is exported.
        call: the example.
        sizes: which of its dimensions vary.
        inputs: names for its tensors.
        outputs: names of what the model returns.
        opset: the operator set; by default the exporter's.
        adapters: ``"merged"``, ``"runtime"``, or ``"none"`` for a model without adapters.
        check: a comparison on the user's data.
        contract: what the file must have for a certain run time.
        provenance: what is written beside the file.
    """

    model: nn.Module
    exporter: NamedOutputs
    call: ModuleCall
    sizes: VaryingSizes
    inputs: list[str]
    outputs: list[str]
    opset: int | None
    adapters: str
    check: SampleCheck | None = None
    contract: FileContract | None = None
    provenance: Provenance | None = None


def make_task(
    model: nn.Module,
    exporter: NamedOutputs,
    call: ModuleCall,
    *,
    opset: int | None,
    adapters: str,
    check: SampleCheck | None = None,
    contract: FileContract | None = None,
) -> ExportTask:
    """Run the example, and describe what is to be exported.

    Raises:
        ExportError: the model refuses the example, or returns no tensor.
        VerificationError: it returns no finite values.
    """
    with canonical_kernels(), torch.no_grad():
        outputs = [name for name, _ in _run_example(exporter, call)]
    return ExportTask(
        model=model,
        exporter=exporter,
        call=call,
        sizes=find_varying_sizes(exporter, call),
        inputs=spell_names(call.names),
        outputs=outputs,
        opset=opset,
        adapters=adapters if isinstance(model, AdaptedModel) else "none",
        check=check,
        contract=contract,
    )


def assert_adapters(model: nn.Module, adapters: str) -> None:
    """Raise :class:`ConfigError` for an option ``adapters`` that is unknown or impossible for this model."""
    if adapters not in ("merged", "runtime"):
        raise ConfigError(f"export_onnx(adapters={adapters!r}): expected 'merged' or 'runtime'")
    if adapters == "runtime" and not isinstance(model, AdaptedModel):
        raise ConfigError(
            f"export_onnx(adapters='runtime') got a {type(model).__name__}, expected an AdaptedModel; "
            "compile_with_adapters makes one"
        )
    if adapters == "runtime" and isinstance(model, AdaptedModel):
        assert_additive(model.plan)


def _run_example(exporter: NamedOutputs, call: ModuleCall) -> list[tuple[str, torch.Tensor]]:
    """The example's outputs; without finite values no file could be verified, so nothing is exported."""
    try:
        expected = exporter.named_outputs(call)
    except Exception as error:  # the model's own code raises what it likes
        raise ExportError(describe_refusal(exporter.module, *call.rebuild(call.tensors), error)) from error
    if not expected:
        raise ExportError(
            f"{type(exporter.module).__name__} returns no tensor that a file could give; expected a tensor, or tuples, "
            "dicts or dataclasses of some; return one, or register the class with torch.utils._pytree"
        )
    for name, tensor in expected:
        assert_comparable("example", name, tensor)
    return expected
