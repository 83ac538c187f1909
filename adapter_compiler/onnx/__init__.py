"""Export to ONNX, verified on onnxruntime."""

from adapter_compiler.onnx.export import export_onnx
from adapter_compiler.onnx.verify import ExportReport, OutputError

__all__ = ["ExportReport", "OutputError", "export_onnx"]
