"""What a graph says about weights: their uses, their roles, and the blocks that they belong to.

Analyses only read graphs. They edit nothing and do not decide which weight gets an adapter; see
:mod:`passes.planning` for that.
"""
