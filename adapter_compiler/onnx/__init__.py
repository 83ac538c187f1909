"""Export to ONNX, verified on onnxruntime."""

from __future__ import annotations

from typing import TYPE_CHECKING

from adapter_compiler.onnx.lazy_imports import import_on_demand

if TYPE_CHECKING:
    from adapter_compiler.onnx.decoders.export_decoder import export_decoder
    from adapter_compiler.onnx.decoders.genai_config import write_genai_config
    from adapter_compiler.onnx.exporting.export import export_onnx
    from adapter_compiler.onnx.provenance.signature import verify_signature
    from adapter_compiler.onnx.provenance.write import Provenance, write_provenance
    from adapter_compiler.onnx.serving.adapter_file import save_onnx_adapter
    from adapter_compiler.onnx.serving.decoding import OnnxDecoder
    from adapter_compiler.onnx.serving.session import OnnxAdapters
    from adapter_compiler.onnx.verification.report import ExportAttempt, ExportReport, OutputError
    from adapter_compiler.onnx.verify_model import FileVerification, verify_onnx
else:
    _MODULES = {
        "serving.adapter_file": ("save_onnx_adapter",),
        "decoders.export_decoder": ("export_decoder",),
        "decoders.genai_config": ("write_genai_config",),
        "exporting.export": ("export_onnx",),
        "provenance.signature": ("verify_signature",),
        "provenance.write": ("Provenance", "write_provenance"),
        "verification.report": ("ExportAttempt", "ExportReport", "OutputError"),
        "serving.decoding": ("OnnxDecoder",),
        "serving.session": ("OnnxAdapters",),
        "verify_model": ("FileVerification", "verify_onnx"),
    }
    _PLACES = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}
    __getattr__ = import_on_demand(__name__, _PLACES)

__all__ = [
    "ExportAttempt",
    "ExportReport",
    "FileVerification",
    "OnnxAdapters",
    "OnnxDecoder",
    "OutputError",
    "Provenance",
    "export_decoder",
    "export_onnx",
    "save_onnx_adapter",
    "verify_onnx",
    "verify_signature",
    "write_genai_config",
    "write_provenance",
]
