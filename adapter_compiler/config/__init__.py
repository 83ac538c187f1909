"""The user's options, as validated dataclasses; nothing here runs a model."""
