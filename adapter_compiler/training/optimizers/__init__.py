"""Optimizers for adapters, which normalize the momentum of whole factors or triplets instead of single elements."""

from adapter_compiler.training.optimizers.adapter_optimizer import AdapterMuon, AdapterNormalized
from adapter_compiler.training.optimizers.make_optimizer import make_optimizer

__all__ = ["AdapterMuon", "AdapterNormalized", "make_optimizer"]
