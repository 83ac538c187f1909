"""ONNX files as files: their weights and metadata, read and written without loading the graph."""
