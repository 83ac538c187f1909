"""Adapters at run time: files that go into a session of onnxruntime, chosen for each call."""
