"""Adapters in the formats of other run times: each by its own rule of scales and ranks, or refused by name."""
