"""The weights and metadata of ONNX files, read and written without loading the graph."""
