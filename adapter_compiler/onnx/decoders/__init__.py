"""Decoders: causal language models whose files take and return the key-value cache."""
