"""Operators and graph passes that compute the same results in less time or memory.

Every pass here is optional: without it, a graph gives the same outputs and gradients within rounding.
"""
