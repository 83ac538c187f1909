"""Export to ONNX, verified on onnxruntime."""

from adapter_compiler.onnx.adapter_file import save_onnx_adapter
from adapter_compiler.onnx.export import export_onnx
from adapter_compiler.onnx.report import ExportAttempt, ExportReport, OutputError
from adapter_compiler.onnx.session import OnnxAdapters
from adapter_compiler.onnx.verify_model import FileVerification, verify_onnx

__all__ = [
    "ExportAttempt",
    "ExportReport",
    "FileVerification",
    "OnnxAdapters",
    "OutputError",
    "export_onnx",
    "save_onnx_adapter",
    "verify_onnx",
]
