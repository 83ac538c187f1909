"""Smaller files by onnxruntime's own quantizers: float16, int8 and 4-bit weights, and what rounding does to updates."""
