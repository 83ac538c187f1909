"""Insert the adapters of a plan into graphs, and fold them into weights.

Also the same arithmetic on tensors, for calls without a graph. What an adapter computes is in :mod:`passes.forms`;
which weight gets one is decided in :mod:`passes.planning`.
"""
