"""``adapter-compiler demo``: a model from its pre-training to a verified ONNX file, on real images."""
