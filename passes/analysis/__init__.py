"""What a graph says about weights: uses, roles, blocks."""
