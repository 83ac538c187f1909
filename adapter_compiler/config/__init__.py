"""The user's options, as validated dataclasses, and how progress is told; nothing here runs a model."""
