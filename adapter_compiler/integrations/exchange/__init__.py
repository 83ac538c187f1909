"""Exchanged adapters replayed: by our own readers, and by the run times that are installed."""
