"""Adapters on disk: saved, loaded, converted and folded into files."""
