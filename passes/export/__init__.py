"""Graph rewrites that only the ONNX export needs."""
