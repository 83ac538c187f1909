"""Weights that stay quantized ("packed") in memory, in modules and in graphs.

How values are quantized is not decided here: callers pass a :class:`~passes.quantize.packed_weights.Quantizer`.
"""
