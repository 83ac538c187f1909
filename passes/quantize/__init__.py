"""Packed weights in graphs and modules."""
