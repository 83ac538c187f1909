"""The adapted model: how a call computes with W + ΔW, and how the model is folded."""
