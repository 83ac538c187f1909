"""Rewrites that only the ONNX export needs: of graphs before it, and of the ONNX graph after it.

Files, exporters and verification are in :mod:`adapter_compiler.onnx`.
"""
