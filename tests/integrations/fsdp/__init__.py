"""Tests of models that are sharded over gloo ranks."""
