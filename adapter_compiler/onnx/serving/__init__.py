"""Run-time adapters: files that go into a session of onnxruntime, switched per call."""
