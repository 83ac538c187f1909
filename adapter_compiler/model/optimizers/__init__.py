"""Optimizers for adapters, which normalize the momentum of whole factors or triplets instead of single elements."""

from adapter_compiler.model.optimizers.adapter_optimizer import AdapterMuon, AdapterNormalized, AdapterOptimizer

__all__ = ["AdapterMuon", "AdapterNormalized", "AdapterOptimizer"]
