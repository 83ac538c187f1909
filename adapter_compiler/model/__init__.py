"""The adapted model: how a call gives W + ΔW, and how it folds back."""
