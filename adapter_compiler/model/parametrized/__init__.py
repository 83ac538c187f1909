"""Weights that a parametrization computes (weight_norm, spectral_norm, orthogonal, a user's own), as plain weights."""
