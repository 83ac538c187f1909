"""Fold saved adapters into files of weights, without the model's code."""
