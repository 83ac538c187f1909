"""Decide which weight gets which adapter: sites, rules and plans, as plain data.

Nothing here edits a graph or holds parameters. How a graph uses its weights is found in :mod:`passes.analysis`.
"""
