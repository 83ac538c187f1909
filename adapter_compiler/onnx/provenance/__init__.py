"""Where an ONNX file comes from: a model card, a CycloneDX bill of materials, and a detached signature beside it."""
