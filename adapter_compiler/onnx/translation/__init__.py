"""From a model to an ONNX graph: fallback strategies, one after another."""
