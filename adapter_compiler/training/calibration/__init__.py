"""Starts and ranks that come from gradients or layer inputs of a few batches."""
