"""Initial values and ranks computed from gradients or layer inputs of a few batches."""
